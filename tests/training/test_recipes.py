"""Every training stage: its hyper-parameters against the published ones, its model at full size, and its tiny twin."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from opensora import presets
from opensora.cli.train_all import all_stages
from opensora.config import (
    EncodeConfig,
    IDDPMConfig,
    LatteT2VConfig,
    ParallelConfig,
    RectifiedFlowConfig,
    TrainConfig,
    TransformerConfig,
)
from opensora.data.buckets import Buckets
from opensora.encoding import run_encode
from opensora.loading import MODEL_OF, load_vae
from opensora.parallel import ParallelContext
from opensora.presets.scaling import scaled
from opensora.text.t5 import TextEncoder
from opensora.tiny_parts import complete
from opensora.trainer import run_train
from opensora.training import TrainingResult

KEYS = Path(__file__).parents[1] / "models" / "keys"
STAGES = {stage.name: stage.config for stage in all_stages(with_vae=False)}
V1_0 = [f"open-sora-v1.0 stage{i}" for i in (1, 2, 3)]
V1_1 = [f"open-sora-v1.1 stage{i}" for i in (1, 2, 3)]
V1_2 = [f"open-sora-v1.2 stage{i}" for i in (1, 2, 3)]
ADAPTATION = [name for name in STAGES if " adapt-" in name]
PLAN_1_0 = [f"open-sora-plan-v1.0 {clip}" for clip in ("17x256x256", "65x256x256", "65x512x512")]
PLAN_1_1 = [f"open-sora-plan-v1.1 {clip}" for clip in ("65x512x512", "221x512x512", "513x512x512")]


def options(name: str) -> dict[str, Any]:
    """The hyper-parameters that the upstreams' configurations and reports name."""
    config = STAGES[name]
    return {
        "lr": config.optimizer.lr,
        "eps": config.optimizer.eps,
        "weight_decay": config.optimizer.weight_decay,
        "warmup": config.optimizer.warmup_steps,
        "ema": config.optimizer.ema_decay,
        "clip": config.optimizer.grad_clip,
        "checkpointing": config.run.grad_checkpoint,
        "every": config.run.checkpoint_every,
        "dtype": config.run.dtype,
        "tokens": config.transformer.model_max_length,
        "given": round(sum(config.mask_ratios.values()), 4),
    }


COMMON = {"weight_decay": 0.0, "warmup": 0, "clip": 1.0, "dtype": "bf16"}
OLD = COMMON | {"lr": 2e-5, "eps": 1e-8}
NEW = COMMON | {"lr": 1e-4, "eps": 1e-15, "ema": 0.99, "tokens": 300}
PLAN = OLD | {"weight_decay": 1e-2, "ema": 0.0, "tokens": 300, "given": 0, "checkpointing": True, "every": 500}
# The numbers of hpcaitech/Open-Sora v1.0.0, v1.1.0 and v1.2.0, configs, and Open-Sora-Plan v1.0.0 and v1.1.0, scripts.
PUBLISHED: dict[str, dict[str, Any]] = {
    V1_0[0]: OLD | {"ema": 0.9999, "tokens": 120, "given": 0, "checkpointing": True, "every": 1000},
    V1_0[1]: OLD | {"ema": 0.9999, "tokens": 120, "given": 0, "checkpointing": False, "every": 500},
    V1_0[2]: OLD | {"ema": 0.9999, "tokens": 120, "given": 0, "checkpointing": True, "every": 250},
    "open-sora-v1.1 images": OLD | {"ema": 0.0, "tokens": 200, "given": 0, "checkpointing": True, "every": 500},
    V1_1[0]: OLD | {"ema": 0.0, "tokens": 200, "given": 0.25, "checkpointing": False, "every": 500},
    V1_1[1]: OLD | {"ema": 0.0, "tokens": 200, "given": 0.25, "checkpointing": True, "every": 500},
    V1_1[2]: OLD | {"ema": 0.0, "tokens": 200, "given": 0.25, "checkpointing": True, "every": 500},
    V1_2[0]: NEW | {"given": 0.2, "warmup": 1000, "checkpointing": True, "every": 200},
    V1_2[1]: NEW | {"given": 0.2, "checkpointing": True, "every": 200},
    V1_2[2]: NEW | {"given": 0.25, "warmup": 1000, "checkpointing": True, "every": 200},
    ADAPTATION[-1]: NEW | {"given": 0.5, "checkpointing": False, "every": 500},
    **dict.fromkeys(PLAN_1_0 + PLAN_1_1, PLAN),
}
STEPS = {
    **dict(zip(V1_2, (30_000, 23_000, 15_000), strict=True)),
    **dict(zip(ADAPTATION, (20_000, 18_000, 10_000, 33_000, 8_000, 25_000, 3_000, 38_000), strict=True)),
    **dict(zip(["open-sora-v1.1 images", *V1_1], (6_000, 81_000, 22_000, 4_000), strict=True)),
}
# (frames, height, width), every how many frames, clips for each accelerator, images beside each clip.
CLIPS = {
    V1_0[0]: ((16, 256, 256), 3, 8, 0),
    V1_0[1]: ((16, 512, 512), 3, 8, 0),
    V1_0[2]: ((64, 512, 512), 3, 4, 0),
    PLAN_1_0[0]: ((17, 256, 256), 1, 4, 4),
    PLAN_1_0[1]: ((65, 256, 256), 1, 4, 4),
    PLAN_1_0[2]: ((65, 512, 512), 1, 2, 16),
    PLAN_1_1[0]: ((65, 512, 512), 1, 2, 4),
    PLAN_1_1[1]: ((221, 512, 512), 1, 1, 4),
    PLAN_1_1[2]: ((513, 512, 512), 1, 1, 4),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_hyper_parameters_are_the_published_ones(name: str):
    assert options(name) == pytest.approx(PUBLISHED[name])


def test_lengths_of_stages_and_sizes_of_clips_are_the_published_ones():
    assert {name: STAGES[name].run.steps for name in STEPS} == STEPS
    for name, (size, interval, batch_size, num_images) in CLIPS.items():
        data = STAGES[name].data
        assert ((data.num_frames, *data.image_size), data.frame_interval) == (size, interval), name
        assert (data.batch_size, data.use_image_num) == (batch_size, num_images), name
    assert {name for name, config in STAGES.items() if config.data.flip} == set(V1_0)
    assert {name for name, config in STAGES.items() if config.data.file_fps} == {"open-sora-v1.1 images", *V1_1}


def test_the_eight_steps_to_open_sora_1_2_change_one_thing_at_a_time():
    steps = [STAGES[name] for name in ADAPTATION]
    assert [type(step.scheduler) for step in steps] == [IDDPMConfig] * 2 + [RectifiedFlowConfig] * 6
    assert [step.transformer.qk_norm for step in steps] == [False] + [True] * 7
    flows = [step.scheduler for step in steps[2:]]
    assert [flow.sample_method for flow in flows] == ["uniform"] + ["logit-normal"] * 5
    assert [flow.use_timestep_transform for flow in flows] == [False] + [True] * 5
    assert [step.optimizer.eps for step in steps] == [1e-8] * 4 + [1e-15] * 4
    assert [step.vae_kind for step in steps] == ["frames"] * 5 + ["stacked"] * 3
    assert ["fps_embedder." in step.frozen for step in steps] == [True] * 5 + [False] * 3
    assert ["temporal_blocks." in step.frozen for step in steps] == [True] * 6 + [False] * 2
    assert [step.transformer.only_train_temporal for step in steps] == [False] * 7 + [True]
    assert [max(max(cells) for cells in step.data.buckets.values()) > 1 for step in steps] == [False] * 7 + [True]


def test_each_stage_begins_where_the_one_before_ends():
    outputs = {f"{config.run.output}/model/transformer": name for name, config in STAGES.items()}
    first = [name for name, config in STAGES.items() if config.initial_transformer not in outputs]
    starts = ["open-sora-v1.0 stage1", "open-sora-v1.1 images", ADAPTATION[0], PLAN_1_0[0], PLAN_1_1[0]]
    assert sorted(first) == sorted(starts)
    order = list(STAGES)
    for name, config in STAGES.items():
        assert name in first or order.index(outputs[config.initial_transformer]) < order.index(name)


@cache
def full_size(config: TransformerConfig) -> tuple[int, int, dict[str, list[int]]]:
    """Parameters, those that are trained, and shapes of the state dict."""
    with torch.device("meta"):
        model = MODEL_OF[type(config)](config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    return sum(p.numel() for p in model.parameters()), trained, shapes


LATTE = 1_057_738_400 - 120 * 4096  # the null caption is a buffer
COUNTS = (
    ("open-sora-v1.0", "stdit-xl-2", 759_620_768),
    ("open-sora-v1.1", "stdit2-xl-2", 767_452_100),
    ("open-sora-v1.2", "stdit3-xl-2", 1_207_643_972),
    ("open-sora-plan", "latte-t2v-xl", LATTE),
)


@pytest.mark.parametrize("name", STAGES)
def test_models_at_full_size_have_the_released_names_and_numbers(name: str):
    config = STAGES[name].transformer
    count, trained, shapes = full_size(config)
    keys, expected = next((keys, number) for beginning, keys, number in COUNTS if name.startswith(beginning))
    wanted = json.loads((KEYS / f"{keys}.json").read_text())
    wanted.pop("_meta", None)
    names = set(wanted)
    if name == ADAPTATION[0]:  # norms of queries and keys come with the second step
        norms = {key for key in names if ".attn.q_norm." in key or ".attn.k_norm." in key}
        names, expected = names - norms, expected - 72 * len(norms)
    assert set(shapes) == names
    assert count == expected
    frozen = 36  # rotation frequencies
    if name in V1_2:
        frozen += 4096 * 1152 + 1152 + 1152 * 1152 + 1152  # the projection of captions
    if name.startswith(("open-sora-v1.1", "open-sora-v1.2")) and name != ADAPTATION[-1]:
        assert trained == count - frozen
    if name == ADAPTATION[-1]:
        assert trained == sum(math.prod(s) for key, s in shapes.items() if key.startswith("temporal_blocks."))


@pytest.mark.parametrize("name", STAGES)
def test_a_twin_has_the_structure_of_its_stage(name: str):
    stage, twin = STAGES[name], scaled(STAGES[name], "tiny")
    same = ("mask_ratios", "vae_kind", "tile_vae", "frozen", "cache_latents", "image_ratio", "train_text_encoder")
    assert all(getattr(twin, field) == getattr(stage, field) for field in same)
    assert type(twin.transformer) is type(stage.transformer)
    assert replace(twin.scheduler, num_sampling_steps=stage.scheduler.num_sampling_steps) == stage.scheduler
    sizes = {
        *("hidden_size", "depth", "num_heads", "in_channels", "out_channels", "caption_channels", "model_max_length"),
        *("input_size", "input_sq_size", "sample_size", "video_length"),
        *("num_attention_heads", "attention_head_dim", "cross_attention_dim", "num_layers"),
    }
    tiny = asdict(twin.transformer)
    assert {key for key, value in asdict(stage.transformer).items() if tiny[key] != value} <= sizes
    for field in ("eps", "betas", "weight_decay", "decay", "grad_clip", "accumulation_steps"):
        assert getattr(twin.optimizer, field) == getattr(stage.optimizer, field)
    assert bool(twin.data.buckets) == bool(stage.data.buckets)
    assert bool(twin.data.use_image_num) == bool(stage.data.use_image_num)
    assert twin.data.frame_interval == stage.data.frame_interval
    assert twin.run.grad_checkpoint == stage.run.grad_checkpoint
    if stage.data.buckets:
        Buckets(twin.data.buckets)  # resolutions and batch sizes are ones that can be
        has_videos = {max(cells) > 1 for cells in stage.data.buckets.values()}
        assert (True in has_videos) == any(max(cells) > 1 for cells in twin.data.buckets.values())
    if isinstance(twin.transformer, LatteT2VConfig):
        assert (twin.data.num_frames - 1) // 4 + 1 == twin.transformer.video_length


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parts")


def train_twin(name: str, parts: Path, output: Path, *, steps: int = 2, **changes: Any) -> TrainingResult:
    config = complete(scaled(STAGES[name], "tiny"), parts)
    run = {"output": str(output), "steps": steps, "validate_every": 0, "sample_every": 0, "log_every": 1}
    run |= {"tensorboard": False, "device": "cpu", "num_threads": 1} | changes.pop("run", {})
    return run_train(replace(config, run=replace(config.run, **run), **changes))


KINDS = {
    "open-sora-v1.0 stage1": {},  # IDDPM, from an image model
    "open-sora-v1.1 images": {},  # weights of SpeeD
    "open-sora-v1.1 stage1": {},  # buckets and given frames
    ADAPTATION[1]: {},  # rectified flow's model under IDDPM, temporal blocks frozen
    "open-sora-v1.2 stage3": {},  # rectified flow and the stacked VAE
    PLAN_1_0[1]: {},  # frames of the clip beside it
    PLAN_1_1[0]: {},  # other images beside it
}


@pytest.mark.parametrize("name", KINDS)
def test_a_twin_of_each_kind_trains(name: str, parts: Path, tmp_path: Path):
    result = train_twin(name, parts, tmp_path)
    assert result.step == 2
    assert math.isfinite(result.loss)
    assert (result.model / "transformer" / "model.safetensors").exists()


def test_a_stage_lowers_the_held_out_loss_of_the_one_before(parts: Path, tmp_path: Path):
    from opensora.cli.train_all import _validation

    before: dict[str, Any] = {}
    for name in V1_0[:2]:
        output = tmp_path / name
        result = train_twin(name, parts, output, steps=12, run={"validate_every": 12}, **before)
        losses = dict(_validation(output / "validation.csv"))
        assert list(losses) == [0, 12]
        assert losses[12] < losses[0]
        before = {"initial_transformer": str(result.model / "transformer")}


class OneOfTwo(ParallelContext):
    data_world_size = 2


def test_ranks_that_share_latte_do_not_have_clips_on_one_and_images_on_another(tmp_path: Path):
    config = scaled(STAGES[PLAN_1_1[0]], "tiny")
    data = replace(config.data, use_image_num=0, image_manifest="")
    buckets = replace(data, buckets={"32": {1: (1.0, 2), 9: (1.0, 1)}})
    for changes in ({"data": data, "image_ratio": 0.5}, {"data": buckets}):
        with pytest.raises(ValueError, match=r"sharding must be 'none' for LatteT2V .* data.use_image_num puts"):
            run_train(replace(config, **changes), context=OneOfTwo())
        unshared = replace(config, parallel=ParallelConfig(sharding="none"), **changes)
        with pytest.raises(FileNotFoundError):  # of clips: nothing else is wrong
            run_train(unshared, context=OneOfTwo())


def test_samples_are_videos_beside_the_sheet(parts: Path, tmp_path: Path):
    train_twin("open-sora-v1.0 stage1", parts, tmp_path, steps=1, run={"sample_every": 1})
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert names == ["step-00000001-0-0.mp4", "step-00000001.png"]


def test_parts_are_made_once_and_whole(parts: Path):
    config = scaled(STAGES[PLAN_1_1[0]], "tiny")
    first, second = complete(config, parts), complete(config, parts)
    assert first == second
    assert Path(first.data.image_manifest).exists()
    assert Path(first.vae).is_dir()
    assert not [path for path in parts.iterdir() if path.name.startswith(".")]


def test_a_preset_is_found_with_its_stage():
    assert presets.get("open-sora-1.2").name == presets.get("Open_Sora_v1_2").name == "open-sora-v1.2"
    for name, wanted in {
        "open-sora-1.2-stage1": ("open-sora-v1.2", "stage1"),
        "open-sora-v1.2-adapt-8-video": ("open-sora-v1.2", "adapt-8-video"),
        "open-sora-plan-1.1-65x512x512": ("open-sora-plan-v1.1", "65x512x512"),
        "open-sora-plan-v1.1-221x512x512": ("open-sora-plan-v1.1-221x512x512", None),
        "tiny": ("tiny", None),
    }.items():
        preset, stage = presets.get_with_stage(name)
        assert (preset.name, stage) == wanted
    with pytest.raises(ValueError, match=r"stages of open-sora-v1\.1 are stage1, stage2, stage3, images, got"):
        presets.get_with_stage("open-sora-1.1-stage7")
    with pytest.raises(ValueError, match="preset: must be one of"):
        presets.get_with_stage("close-sora")
    with pytest.raises(ValueError, match="scale: must be one of full, tiny, got 'huge'"):
        scaled(TrainConfig(), "huge")


def test_encoded_clips_train_without_the_models_that_encoded_them(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    twin = complete(scaled(STAGES["open-sora-v1.2 stage1"], "tiny"), parts)
    data = replace(twin.data, manifest=twin.data.validation, buckets={"32": {1: (1.0, 2), 17: (1.0, 1)}})
    encoded = EncodeConfig(output=str(tmp_path / "encoded"), data=data, store="moments", dtype="fp32")
    vae = load_vae(twin.vae, twin.vae_kind, dtype=torch.float32, device=torch.device("cpu"))
    text = TextEncoder.from_pretrained(twin.text_encoder, model_max_length=twin.transformer.model_max_length)
    assert run_encode(encoded, vae, text).is_finished

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("nothing is left to encode")

    monkeypatch.setattr("opensora.trainer.load_vae", refuse)
    monkeypatch.setattr("opensora.trainer.TextEncoder.from_pretrained", refuse)
    data = replace(data, encoded=encoded.output, manifest="", cache_in_memory=False)
    result = train_twin("open-sora-v1.2 stage1", parts, tmp_path / "run", data=data, vae="", text_encoder="")
    assert math.isfinite(result.loss)
