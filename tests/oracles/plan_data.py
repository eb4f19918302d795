"""Replays `dataset-logic`: how Open-Sora-Plan cuts, pads, groups and cleans what it trains on, and its noise tables."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from opensora.data.joint import image_groups, num_latents, pad_batch, pad_clips, round_up
from opensora.data.transforms import (
    center_crop,
    crop_to_multiple,
    random_window,
    resize,
    shrink_long_side,
    spread_indices,
    transform_video,
)
from opensora.presets import open_sora_plan_v1_1
from opensora.schedulers.gaussian_diffusion import GaussianDiffusion, retained_timesteps
from opensora.text.cleaning import clean_caption
from opensora.vae import CausalVideoVAE
from tests.oracles.registry import Case, Check, adapter

# Four products of fp32 weights and values up to 1.
PIXEL_LIMIT = 1e-6


@adapter("dataset-logic")
def dataset_logic(case: Case) -> Iterator[Check]:
    logic = case.json("logic.json")
    yield from _pixels(case)
    yield from _collate(logic["collate"])
    yield from _frames(logic)
    yield from _latent_sizes(logic)
    for name in ("text_preprocessing", "pipeline_text"):
        for i, (text, cleaned) in enumerate(logic[name]):
            yield Check(f"{name}.{i}", clean_caption(text), cleaned, exact=True)
    yield from _noise_tables(logic)


def _pixels(case: Case) -> Iterator[Check]:
    clip, expected = case.inputs["clip_uint8"], case.outputs
    frames = clip.float() / 255
    yield Check("to_tensor", frames, expected["to_tensor"], max_abs=0.0)
    yield Check("center_crop_20", center_crop(frames, (20, 20)), expected["center_crop_20"], max_abs=0.0)
    yield Check("center_crop_20x31", center_crop(frames, (20, 31)), expected["center_crop_20x31"], max_abs=0.0)
    square = resize(center_crop(frames, (37, 37)), (24, 24))
    yield Check("center_crop_resize_24", square, expected["center_crop_resize_24"], max_abs=PIXEL_LIMIT)
    normal = transform_video(clip, (24, 24), fit="square")
    yield Check("norm_t2v", normal, expected["norm_t2v"], max_abs=2 * PIXEL_LIMIT)
    yield Check("long_side_32", shrink_long_side(frames, 32), expected["long_side_32"], max_abs=PIXEL_LIMIT)
    yield Check("long_side_64_skip_low", shrink_long_side(frames, 64), expected["long_side_64_skip_low"], max_abs=0.0)
    yield Check("stride_crop_16", crop_to_multiple(frames, 16), expected["stride_crop_16"], max_abs=0.0)


def _collate(rows: list[dict[str, Any]]) -> Iterator[Check]:
    for i, row in enumerate(rows):
        size = (row["num_frames"], row["max_image_size"], row["max_image_size"])
        for part in row["cases"]:
            name = f"collate.{i}.{part['kind']}"
            padded, mask = pad_clips([torch.ones(shape) for shape in part["in_shapes_cthw"]], size)
            yield Check(f"{name}.padded", list(padded.shape), part["padded_shape"], exact=True)
            yield Check(f"{name}.mask", list(mask.shape), part["mask_shape"], exact=True)
            ones = [_extent(each) for each in mask]
            yield Check(f"{name}.mask_ones", ones, part["mask_ones_per_sample_thw"], exact=True)
        if "batch" in row:
            yield from _batch(f"collate.{i}.batch", row)


def _extent(mask_THW: Tensor) -> list[int]:
    """Sides of the block of ones, which must begin at 0 and have no hole."""
    sides = [int(mask_THW.amax(dim=[d for d in range(3) if d != axis]).sum()) for axis in range(3)]
    assert mask_THW.sum() == mask_THW[: sides[0], : sides[1], : sides[2]].numel()
    return sides


def _batch(name: str, row: dict[str, Any]) -> Iterator[Check]:
    """Clips and images beside them, of heights that the recorded sums of the mask tell; upstream joins them in time."""
    expected, side = row["batch"], row["max_image_size"]
    sums = torch.tensor(expected["attention_mask_sum_per_frame"])
    num_frames, num_images = row["num_frames"], row["use_image_num"]
    heights = (sums / (side // 8) * 8).int().tolist()
    batch = {
        "video": [torch.ones(3, num_frames, each[0], side) for each in heights],
        "images": [[torch.ones(3, height, side) for height in each[-num_images:]] for each in heights],
    }
    padded = pad_batch(batch, (num_frames, side, side))
    joined = torch.cat([padded["video"], padded["images"].transpose(1, 2)], dim=2)
    order = ("pad_batch_tubes", "attention_mask")
    for key, actual in zip(order, (joined, padded["attention_mask"]), strict=True):
        yield Check(f"{name}.{key}", list(actual.shape), expected[key], exact=True)
    yield Check(f"{name}.mask_sums", padded["attention_mask"].sum((2, 3)), sums, exact=True)


def _frames(logic: dict[str, Any]) -> Iterator[Check]:
    for number, multiple, expected in logic["pad_to_multiple"]:
        yield Check(f"pad_to_multiple.{number}.{multiple}", round_up(number, multiple), expected, exact=True)
    for i, row in enumerate(logic["temporal_random_crop"]):
        window = random_window(row["size"], row["total"], generator=random.Random(row["python_random_seed"]))
        yield Check(f"temporal_random_crop.{i}", list(window), row["vae_dataset_same"], exact=True)
        indices = spread_indices(*window, len(row["frame_indices_linspace_int"]))
        yield Check(f"frame_indices.{i}", indices, row["frame_indices_linspace_int"], exact=True)
    for i, row in enumerate(logic["image_from_video_indices"]):
        indices = spread_indices(0, row["num_frames"], row["use_image_num"])
        yield Check(f"image_from_video_indices.{i}", indices, row["idx"], exact=True)
    for i, row in enumerate(logic["image_groups"]):
        groups = image_groups(row["n_images"], row["use_image_num"])
        yield Check(f"image_groups.{i}", len(groups), row["n_groups_after_drop_last"], exact=True)


def _latent_sizes(logic: dict[str, Any]) -> Iterator[Check]:
    with torch.device("meta"):
        vae = CausalVideoVAE(open_sora_plan_v1_1.vae())
    for row in logic["latent_shape"]:
        num_frames = row["num_frames"]
        # Of other lengths upstream rounds some down, 66 frames to 65; ours encodes and decodes no fewer than asked for.
        if num_frames % 4 == 1:
            size = vae.latent_size((num_frames, *row["hw"]))
            yield Check(f"latent_shape.{num_frames}", list(size), row["latent_thw"], exact=True)
    for row in logic["train_video_length"]:
        length = num_latents((row["num_frames"], 8, 8))[0]
        yield Check(f"train_video_length.{row['num_frames']}", length, row["video_length"], exact=True)


def _noise_tables(logic: dict[str, Any]) -> Iterator[Check]:
    for name, expected in logic["space_timesteps"].items():
        respacing = name.strip("[]").replace(" ", "")
        yield Check(f"space_timesteps.{name}", retained_timesteps(1000, respacing), expected, exact=True)
    chain = GaussianDiffusion(retained_timesteps(1000, ""), dtype=torch.float64)
    for name, expected in logic["diffusion_constants"].items():
        table = getattr(chain, name)
        indices = [0, 1, 250, 500, 999] if len(expected) == 5 else [0, 1, 500, 999]
        yield Check(name, table[indices], torch.tensor(expected, dtype=torch.float64), max_abs=1e-12)
