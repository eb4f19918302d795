"""Replays of the cases about strings, integers and pixels: masks, prompts, cleaning, buckets, samplers, transforms."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch

from opensora.conditioning.masks import (
    MaskGenerator,
    align_start,
    apply_mask_strategy,
    latent_to_pixel_frames,
    parse_mask_strategy,
)
from opensora.conditioning.prompts import append_scores, merge_loops, prompt_for_loop, split_json, split_loops
from opensora.config import OptimizerConfig
from opensora.data.aspect_ratios import closest_aspect_key, get_image_size, get_num_frames
from opensora.data.buckets import Buckets
from opensora.data.samplers import VariableVideoBatchSampler
from opensora.data.transforms import temporal_crop_indices, transform_image, transform_video
from opensora.text.cleaning import clean_caption, clean_once, lower_caption
from opensora.training.optimizer import learning_rate
from tests.oracles.registry import Case, Check, adapter


def _answer(name: str, row: dict[str, Any], call: Callable[[], Any]) -> Check:
    """Rows hold "ok" or the name of the original's exception: ours is then always a ValueError with a message."""
    if "ok" in row:
        return Check(name, call(), row["ok"], exact=True)
    try:
        return Check(name, call(), "ValueError", exact=True)
    except ValueError:
        return Check(name, "ValueError", "ValueError", exact=True)


@adapter("aspect_lookup")
def aspect_lookup(case: Case) -> Iterator[Check]:
    for i, row in enumerate(case.cases["get_image_size"]):
        yield _answer(
            f"get_image_size.{i}", row, lambda row=row: list(get_image_size(row["resolution"], row["aspect_ratio"]))
        )
    for i, row in enumerate(case.cases["get_num_frames"]):
        yield _answer(f"get_num_frames.{i}", row, lambda row=row: get_num_frames(row["input"]))
    for i, row in enumerate(case.cases["get_closest_ratio"]):
        key = closest_aspect_key(row["h"], row["w"], row["table"])
        yield Check(f"get_closest_ratio.{i}", key, row["result"], exact=True)


@adapter("buckets")
def buckets(case: Case) -> Iterator[Check]:
    ready = {name: Buckets(config["bucket_config"]) for name, config in case.cases["configs"].items()}
    for name, config in case.cases["configs"].items():
        yield Check(f"{name}.num_bucket", len(ready[name]), config["num_bucket"], exact=True)
    for row in case.cases["results"]:
        table = ready[row["config"]]
        keys = [
            table.assign(*shape, frame_interval=row["frame_interval"], seed=row["sampler_seed"] + i * len(table))
            for i, shape in enumerate(case.cases["videos_THW"])
        ]
        name = f"{row['config']}.interval{row['frame_interval']}"
        yield Check(f"{name}.bucket", [key and list(key) for key in keys], row["bucket"], exact=True)
        yield Check(f"{name}.thw", [key and list(table.size(key)) for key in keys], row["thw"], exact=True)


@adapter("bucket_sampler")
def bucket_sampler(case: Case) -> Iterator[Check]:
    table = Buckets(case.cases["bucket_config"])
    for i, run in enumerate(case.cases["runs"]):
        for rank, expected in enumerate(run["batches_per_rank"]):
            sampler = VariableVideoBatchSampler(
                case.cases["videos_THW"],
                table,
                rank=rank,
                num_replicas=run["num_replicas"],
                seed=case.cases["sampler_seed"],
                drop_last=run["drop_last"],
                fill_small_buckets=False,
            )
            sampler.load_state_dict(
                {
                    "seed": sampler.seed,
                    "epoch": run["epoch"],
                    "last_micro_batch_access_index": run["last_micro_batch_access_index"],
                }
            )
            batches = [[str(request) for request in batch] for batch in sampler]
            yield Check(f"run{i}.rank{rank}", batches, expected, exact=True)


@adapter("mask_generator")
def mask_generator(case: Case) -> Iterator[Check]:
    for i, run in enumerate(case.cases["runs"]):
        generator = MaskGenerator(run["mask_ratios"], short_clips="original")
        for row in run["rows"]:
            random.seed(row["seed"])
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(row["seed"])
                try:
                    mask = generator.draw(row["T"]).int().tolist()
                except ValueError:
                    mask = "ValueError"
            yield Check(f"run{i}.T{row['T']}.seed{row['seed']}", mask, row["mask"], exact=True)


@adapter("mask_strategy")
def mask_strategy(case: Case) -> Iterator[Check]:
    for i, row in enumerate(case.cases["parse"]):
        yield _answer(f"parse.{i}", row, lambda row=row: [list(group) for group in parse_mask_strategy(row["input"])])
    for i, row in enumerate(case.cases["apply"]):
        z = (-1 - torch.arange(row["T"]) / 100).reshape(1, 1, -1, 1, 1).repeat(row["B"], 1, 1, 1, 1)
        references = [
            [(100 * b + 10 * r + torch.arange(length)).float().reshape(1, -1, 1, 1) for r, length in enumerate(lengths)]
            for b, lengths in enumerate(row["ref_lens"])
        ]
        z, mask = apply_mask_strategy(z, references, row["strategies"], row["loop_i"], align=row["align"])
        expected_z = torch.tensor(row["z_after"]).reshape(row["B"], row["T"])
        # The record of z is rounded to about six digits.
        yield Check(f"apply.{i}.z", z[:, 0, :, 0, 0], expected_z, max_abs=1e-6)
        yield Check(f"apply.{i}.mask", None if mask is None else mask.tolist(), row["mask"], exact=True)
    for i, row in enumerate(case.cases["find_nearest_point"]):
        start = align_start(row["value"], row["point"], row["max_value"])
        yield Check(f"find_nearest_point.{i}", start, row["result"], exact=True)
    for i, row in enumerate(case.cases["dframe_to_frame"]):
        yield _answer(f"dframe_to_frame.{i}", row, lambda row=row: latent_to_pixel_frames(row["input"]))


@adapter("misc_training")
def misc_training(case: Case) -> Iterator[Check]:
    for i, row in enumerate(case.cases["temporal_random_crop"]):
        generator = random.Random(row["seed"])
        yield _answer(
            f"temporal_random_crop.{i}",
            row,
            lambda row=row, generator=generator: temporal_crop_indices(
                row["num_frames"], row["total"], frame_interval=row["frame_interval"], generator=generator
            ),
        )
    for i, row in enumerate(case.cases["linear_warmup"]):
        config = OptimizerConfig(lr=row["lr"], warmup_steps=row["warmup_steps"])
        rates = [learning_rate(step, config, num_steps=10_000) for step in range(len(row["lrs"]))]
        expected = torch.tensor(row["lrs"], dtype=torch.float64)
        # Ours multiplies before it divides: one rounding of 1e-4 in fp64.
        yield Check(f"linear_warmup.{i}", torch.tensor(rates, dtype=torch.float64), expected, max_abs=1e-19)


@adapter("prompts_and_scores")
def prompts_and_scores(case: Case) -> Iterator[Check]:
    for i, row in enumerate(case.cases["extract_json_from_prompts"]):
        yield _answer(
            f"extract_json_from_prompts.{i}", row, lambda row=row: [[part] for part in split_json(row["input"])[:3]]
        )
    for i, row in enumerate(case.cases["extract_prompts_loop"]):
        text = prompt_for_loop(row["prompt"], row["loop_index"])
        yield Check(f"extract_prompts_loop.{i}", text, row["ok"], exact=True)
    for i, row in enumerate(case.cases["split_then_merge"]):
        texts, starts = split_loops(row["prompt"])
        yield Check(f"split.{i}", [texts, starts], row["split"], exact=True)
        yield Check(f"merge.{i}", merge_loops(texts, starts), row["merged"], exact=True)
    for i, row in enumerate(case.cases["append_score_to_prompts"]):
        text = append_scores(row["prompt"], aes=row["aes"], flow=row["flow"], camera_motion=row["camera_motion"])
        yield Check(f"append_score_to_prompts.{i}", text, row["output"], exact=True)


@adapter("text_preprocessing")
def text_preprocessing(case: Case) -> Iterator[Check]:
    for i, row in enumerate(case.cases["cases"]):
        yield Check(f"{i}.output", clean_caption(row["input"]), row["output"], exact=True)
        yield Check(f"{i}.once", clean_once(row["input"]), row["once"], exact=True)
        yield Check(f"{i}.raw", lower_caption(row["input"]), row["raw"], exact=True)


@adapter("pixel_transforms")
def pixel_transforms(case: Case) -> Iterator[Check]:
    for row in case.config["rows"]:
        i, size = row["i"], tuple(row["target_hw"])
        clip = case.inputs[f"clip_{i}"]
        for fit in ("resize_crop", "center"):
            if f"video_{fit}_{i}" not in case.outputs:
                continue
            # Bilinear weights in fp32: 4 products of values up to 1, doubled by the map to [-1, 1].
            video = transform_video(clip, size, fit=fit)
            yield Check(f"video_{fit}_{i}", video, case.outputs[f"video_{fit}_{i}"], max_abs=2e-6)
            image = transform_image(clip[0], size, fit=fit)
            yield Check(f"image_{fit}_{i}", image, case.outputs[f"image_{fit}_{i}"], max_abs=0.0)
