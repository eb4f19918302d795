"""A training stage scaled down to run on a CPU in minutes: its tiny twin.

Structure and options stay: model class, scheduler, VAE's kind, buckets with their probabilities, given frames, images
beside clips, frozen parts, checkpointing, the optimizer. Sizes shrink: 48 channels in two layers, an eighth of each
side in pixels, the square root of the number of frames and of the batch.

Files that a twin reads are named "made:...": `opensora.tiny_parts` makes them without downloads.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal, TypeVar, get_args

from opensora.config import (
    BucketTable,
    CausalVideoVAEConfig,
    DataConfig,
    LatteT2VConfig,
    OptimizerConfig,
    RunConfig,
    SampleConfig,
    STDiTConfig,
    TrainConfig,
    TrainVAEConfig,
    TransformerConfig,
    VAEKind,
)
from opensora.data.aspect_ratios import get_resolution
from opensora.presets import tiny

Scale = Literal["full", "tiny"]
Training = TypeVar("Training", TrainConfig, TrainVAEConfig)

MADE = "made:"
STEPS = 200
# The image VAE has as many as the stacked one: on the way to Open-Sora 1.2 one takes the other's place.
LATENT_CHANNELS: dict[VAEKind, int] = {"frames": tiny.LATENT_CHANNELS, "stacked": tiny.LATENT_CHANNELS, "causal": 4}
CAPTION_CHANNELS, TEXT_LENGTH = 64, 24
# Pixels up to which a resolution becomes that one.
_RESOLUTIONS = ((256**2, "32"), (512**2, "48"), (math.inf, "64"))
_CHUNK = 17


def scaled(config: Training, scale: str) -> Training:
    """The stage at that scale. Errors: ValueError for a scale that is none."""
    if scale not in get_args(Scale):
        raise ValueError(f"scale: must be one of {', '.join(get_args(Scale))}, got {scale!r}")
    if scale == "full":
        return config
    return _tiny_training(config) if isinstance(config, TrainConfig) else _tiny_vae_training(config)


def _tiny_training(config: TrainConfig) -> TrainConfig:
    transformer = _transformer(config.transformer, config.vae_kind)
    whole_chunks = config.vae_kind == "stacked"
    data = _data(config.data, whole_chunks)
    if isinstance(transformer, LatteT2VConfig) and data.use_image_num and transformer.version == "1.1":
        data = replace(data, image_manifest=f"{MADE}images.csv")
    return replace(
        config,
        transformer=transformer,
        scheduler=replace(config.scheduler, num_sampling_steps=10),
        data=data,
        optimizer=_optimizer(config.optimizer),
        run=_run(config.run),
        vae=_vae(config),
        text_encoder=str(tiny.ASSETS / "text_encoder"),
        initial_transformer=f"{MADE}image-model" if _starts_from_pixart(config) else None,
        num_validation_clips=2,
        sample_prompts=("a red circle moving left",),
        sample=_sample(config.sample, data, whole_chunks),
    )


def _transformer(config: TransformerConfig, vae_kind: VAEKind) -> TransformerConfig:
    text = {"caption_channels": CAPTION_CHANNELS, "model_max_length": TEXT_LENGTH}
    channels = LATENT_CHANNELS[vae_kind]
    if isinstance(config, LatteT2VConfig):
        frames = 1 + 4 * (config.video_length - 1)
        return replace(
            config,
            num_attention_heads=4,
            attention_head_dim=12,
            cross_attention_dim=48,
            num_layers=2,
            in_channels=channels,
            out_channels=2 * channels,
            sample_size=tuple(side // 8 for side in config.sample_size),
            video_length=(_causal_frames(frames) - 1) // 4 + 1,
            **text,
        )
    small = replace(config, hidden_size=48, depth=2, num_heads=4, in_channels=channels, **text)
    if isinstance(small, STDiTConfig):
        # Twice as fine as an eighth, for the tiny image VAE halves sides twice and not three times.
        frames, height, width = small.input_size
        return replace(small, input_size=(_root(frames), height // 4, width // 4))
    return replace(small, input_sq_size=config.input_sq_size // 8)


def _starts_from_pixart(config: TrainConfig) -> bool:
    return (config.initial_transformer or "").endswith(".pth")


def _vae(config: TrainConfig) -> str:
    if config.vae_kind == "stacked":
        return str(tiny.ASSETS / "vae")
    if config.vae_kind == "frames":
        return f"{MADE}vae-frames"
    return f"{MADE}vae-causal-{getattr(config.transformer, 'version', '1.1')}"


def small_causal_vae(released: CausalVideoVAEConfig) -> CausalVideoVAEConfig:
    """As released, with one block of 32 channels a level: GroupNorm has 32 groups."""
    return replace(released, hidden_size=32, hidden_size_mult=(1,) * len(released.hidden_size_mult), num_res_blocks=1)


def _data(config: DataConfig, whole_chunks: bool) -> DataConfig:
    return replace(
        config,
        manifest=f"{MADE}clips.csv",
        validation=f"{MADE}heldout.csv",
        buckets=_buckets(config.buckets, whole_chunks),
        image_size=None if config.image_size is None else tuple(side // 8 for side in config.image_size),
        num_frames=_frames(config.num_frames, whole_chunks),
        batch_size=_root(config.batch_size),
        use_image_num=_root(config.use_image_num) if config.use_image_num else 0,
        num_workers=0,
        cache_in_memory=True,
    )


def _buckets(table: BucketTable, whole_chunks: bool) -> BucketTable:
    """Where several buckets become one, that keeps clips as the one that keeps most of them."""
    small: BucketTable = {}
    for resolution, cells in table.items():
        tiny_cells = small.setdefault(_resolution(resolution), {})
        for num_frames, (probability, batch_size) in cells.items():
            frames = 1 if num_frames == 1 else _frames(num_frames, whole_chunks)
            cell = (probability, _root(_root(batch_size)) if batch_size else 0)
            tiny_cells[frames] = max(tiny_cells.get(frames, cell), cell, key=_kept)
    return small


def _kept(cell: tuple[float | tuple[float, float], int]) -> float:
    return math.prod(cell[0]) if isinstance(cell[0], tuple) else cell[0]


def _resolution(name: str) -> str:
    pixels = get_resolution(name).num_pixels
    return next(small for limit, small in _RESOLUTIONS if pixels <= limit)


def _frames(num_frames: int, whole_chunks: bool) -> int:
    """Of the stacked VAE whole chunks of 17: rectified flow knows no shorter clips."""
    if num_frames == 1:
        return 1
    return _CHUNK * _root(num_frames / (3 * _CHUNK)) if whole_chunks else _frames_of_kind(num_frames)


def _frames_of_kind(num_frames: int) -> int:
    return _causal_frames(num_frames) if num_frames % 4 == 1 else _root(num_frames)


def _causal_frames(num_frames: int) -> int:
    """1 + 4 n frames, as CausalVideoVAE takes them."""
    return 1 + 4 * max(1, round(math.sqrt(num_frames - 1) / 4))


def _root(count: float) -> int:
    return max(1, round(math.sqrt(count)))


def _optimizer(config: OptimizerConfig) -> OptimizerConfig:
    """Up to twenty times the rate: a few hundred steps must show what hundreds of thousands would."""
    return replace(
        config,
        lr=min(20 * config.lr, 1e-3),
        warmup_steps=config.warmup_steps // 100,
        ema_decay=min(config.ema_decay, 0.9),
    )


def _run(config: RunConfig) -> RunConfig:
    return replace(
        config,
        output=f"outputs/tiny/{config.output.removeprefix('outputs/')}",
        steps=STEPS,
        dtype="fp32",
        checkpoint_every=STEPS // 2,
        validate_every=STEPS // 2,
        sample_every=STEPS // 2,
    )


def _sample(config: SampleConfig, data: DataConfig, whole_chunks: bool) -> SampleConfig:
    frames = config.num_frames
    if frames.isdecimal():
        frames = str(_frames(int(frames), whole_chunks))
    return replace(
        config,
        num_frames=frames,
        resolution=None,
        aspect_ratio=None,
        image_size=data.image_size or (64, 64),
        condition_frame_length=1,
        align=None,
        dtype="fp32",
        text_dtype="fp32",
    )


def _tiny_vae_training(config: TrainVAEConfig) -> TrainVAEConfig:
    """The stacked VAE's 2-D half begins as one that was trained; those of Open-Sora-Plan begin from nothing unless told
    where. LPIPS is left out: its weights are not at hand everywhere."""
    # As many channels after time as before it, which a loss compares.
    temporal = replace(tiny.vae().temporal, latent_embed_dim=tiny.FRAME_CHANNELS, embed_dim=tiny.FRAME_CHANNELS)
    changes: dict[str, Any] = {"vae": replace(tiny.vae(), temporal=temporal), "image_vae": f"{MADE}image-vae"}
    num_frames = min(config.data.num_frames, 33)
    if isinstance(config.vae, CausalVideoVAEConfig):
        changes = {"vae": small_causal_vae(config.vae), "image_vae": None}
        num_frames = _causal_frames(num_frames)
    data = replace(_data(replace(config.data, num_frames=1), False), num_frames=num_frames)
    adversary = replace(
        config.adversary,
        start=2 * (STEPS // 4),  # counted twice for each batch: after a quarter of the steps
        channels=16,
        num_layers=2,
        optimizer=_optimizer(config.adversary.optimizer),
    )
    return replace(
        config,
        data=replace(data, batch_size=2),
        optimizer=_optimizer(config.optimizer),
        run=_run(config.run),
        loss=replace(config.loss, perceptual_weight=0.0, perceptual_path=None),
        adversary=adversary,
        initial_vae=None,
        initial_log_variance=-4.0,
        num_statistics_clips=8,
        num_validation_clips=4,
        **changes,
    )
