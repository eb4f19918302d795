"""Every option of every part, as frozen dataclasses; presets fill them in, commands override single fields.

Units: frames and pixels unless a name says `latent`; seconds for durations; timesteps from 0 (clean) to 1000 (noise).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class SpatialVAEConfig:
    """The 2-D image VAE, with the argument names of diffusers' `AutoencoderKL`."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",) * 4
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",) * 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 512
    scaling_factor: float = 0.18215


@dataclass(frozen=True)
class TemporalVAEConfig:
    """The causal temporal VAE on top of the 2-D latents, with upstream's argument names."""

    in_out_channels: int = 4
    latent_embed_dim: int = 4
    embed_dim: int = 4
    filters: int = 128
    num_res_blocks: int = 4
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 4)
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    num_groups: int = 32


@dataclass(frozen=True)
class VideoVAEConfig:
    """Open-Sora 1.2's stacked VAE: chunks of `micro_frame_size` frames, `micro_batch_size` frames at a time in 2-D."""

    spatial: SpatialVAEConfig = field(default_factory=SpatialVAEConfig)
    temporal: TemporalVAEConfig = field(default_factory=TemporalVAEConfig)
    scale: tuple[float, ...] | float = (3.85, 2.32, 2.33, 3.06)
    shift: tuple[float, ...] | float = (-0.10, 0.34, 0.27, 0.98)
    micro_frame_size: int | None = 17
    micro_batch_size: int | None = 4


@dataclass(frozen=True)
class CausalVideoVAEConfig:
    """Open-Sora-Plan's CausalVideoVAE, with upstream's argument names and defaults; "" stands for no module.

    Lists hold one name of a module class for each level, full resolution first. The class cannot be told from the
    weights: AttnBlock3D and AttnBlock3DFix, or average pooling at other levels, have the same keys. `resolution` only
    decides at which levels `attn_resolutions` puts attention. `lr`, `loss_type` and `loss_params` speak of training.
    `scaling_factor` is none of upstream's fields: its samplers multiply latents by that number.
    """

    in_channels: int = 3
    out_channels: int = 3
    hidden_size: int = 128
    hidden_size_mult: tuple[int, ...] = (1, 2, 4, 4)
    z_channels: int = 4
    embed_dim: int = 4
    double_z: bool = True
    num_res_blocks: int = 2
    attn_resolutions: tuple[int, ...] = ()
    dropout: float = 0.0
    resolution: int = 256
    q_conv: str = "CausalConv3d"
    encoder_conv_in: str = "CausalConv3d"
    encoder_conv_out: str = "CausalConv3d"
    encoder_attention: str = "AttnBlock3D"
    encoder_resnet_blocks: tuple[str, ...] = ("ResnetBlock3D",) * 4
    encoder_spatial_downsample: tuple[str, ...] = ("SpatialDownsample2x",) * 3 + ("",)
    encoder_temporal_downsample: tuple[str, ...] = ("", "TimeDownsample2x", "TimeDownsample2x", "")
    encoder_mid_resnet: str = "ResnetBlock3D"
    decoder_conv_in: str = "CausalConv3d"
    decoder_conv_out: str = "CausalConv3d"
    decoder_attention: str = "AttnBlock3D"
    decoder_resnet_blocks: tuple[str, ...] = ("ResnetBlock3D",) * 4
    decoder_spatial_upsample: tuple[str, ...] = ("",) + ("SpatialUpsample2x",) * 3
    decoder_temporal_upsample: tuple[str, ...] = ("", "", "TimeUpsample2x", "TimeUpsample2x")
    decoder_mid_resnet: str = "ResnetBlock3D"
    lr: float = 1e-5
    loss_type: str = "opensora.models.ae.videobase.losses.LPIPSWithDiscriminator"
    loss_params: dict[str, Any] = field(default_factory=dict)
    scaling_factor: float = 0.18215


@dataclass(frozen=True)
class STDiT2Config:
    """Open-Sora 1.1's diffusion transformer, with upstream's argument names and defaults.

    The released weights were trained with input_sq_size 512, model_max_length 200, and qk_norm and qk_norm_legacy on.
    `qk_norm_legacy` rotates queries and keys of temporal attention before they are normalised, not after. `freeze`
    leaves only temporal attention trainable, or all but the attention to the text. `no_temporal_pos_emb` has no effect.
    """

    input_size: tuple[int | None, int | None, int | None] = (None, None, None)
    input_sq_size: int = 32
    in_channels: int = 4
    patch_size: tuple[int, int, int] = (1, 2, 2)
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    class_dropout_prob: float = 0.1
    pred_sigma: bool = True
    drop_path: float = 0.0
    no_temporal_pos_emb: bool = False
    caption_channels: int = 4096
    model_max_length: int = 120
    freeze: Literal["not_temporal", "text"] | None = None
    qk_norm: bool = False
    qk_norm_legacy: bool = False
    exact_rope_dtype: bool = True


@dataclass(frozen=True)
class STDiT3Config:
    """Open-Sora 1.2's diffusion transformer, with upstream's argument names and defaults."""

    input_size: tuple[int | None, int | None, int | None] = (None, None, None)
    input_sq_size: int = 512
    in_channels: int = 4
    patch_size: tuple[int, int, int] = (1, 2, 2)
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    class_dropout_prob: float = 0.1
    pred_sigma: bool = True
    drop_path: float = 0.0
    caption_channels: int = 4096
    model_max_length: int = 300
    qk_norm: bool = True
    only_train_temporal: bool = False
    freeze_y_embedder: bool = False
    skip_y_embedder: bool = False
    exact_rope_dtype: bool = True


@dataclass(frozen=True)
class RectifiedFlowConfig:
    """Open-Sora 1.2's rectified flow: sampling steps, guidance, and how training times are drawn.

    `min_latent_frames` bounds the latent length (frames // 17) * 5 in the timestep transform from below; at 0, as
    upstream, videos of 2 to 16 frames are refused there.
    """

    num_sampling_steps: int = 30
    num_timesteps: int = 1000
    cfg_scale: float = 7.0
    use_discrete_timesteps: bool = False
    use_timestep_transform: bool = True
    sample_method: Literal["uniform", "logit-normal"] = "logit-normal"
    loc: float = 0.0
    scale: float = 1.0
    transform_scale: float = 1.0
    min_latent_frames: int = 0


@dataclass(frozen=True)
class SampleConfig:
    """What to generate. `num_frames` is frames ("51") or seconds ("4s"); `save_fps` None is fps // frame_interval.

    `condition_frame_length` counts latent frames: the overlap of a loop with the one before. `text_dtype` is that of
    the text encoder, `dtype` that of the others. `vae_memory` ("10GiB"): what decoding may take beyond latents and
    weights; None decodes all frames at once.
    """

    num_frames: str = "51"
    resolution: str | None = "240p"
    aspect_ratio: str | None = "9:16"
    image_size: tuple[int, int] | None = None
    fps: float = 24.0
    save_fps: float | None = None
    frame_interval: int = 1
    num_sample: int = 1
    batch_size: int = 1
    loop: int = 1
    condition_frame_length: int = 5
    condition_frame_edit: float = 0.0
    align: int | None = 5
    aes: float | None = 6.5
    flow: float | None = None
    camera_motion: str | None = None
    negative_prompt: str | None = None
    seed: int = 42
    dtype: Precision = "bf16"
    text_dtype: Precision = "fp32"
    vae_memory: str | None = None
    device: str = "auto"


# {resolution: {num_frames: (keep_probability or (keep, frame_probability), batch_size)}}
BucketTable = dict[str, dict[int, tuple[float | tuple[float, float], int]]]


@dataclass(frozen=True)
class DataConfig:
    """Which clips to read and how. `manifest` is a CSV, JSONL or Parquet file with columns path and text."""

    manifest: str = ""
    buckets: BucketTable = field(default_factory=dict)
    image_size: tuple[int, int] | None = None
    num_frames: int = 51
    frame_interval: int = 1
    batch_size: int = 1
    num_workers: int = 0
    cache_in_memory: bool = False
    validation: str = ""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, its schedule, and the averaged copy of the weights.

    The rate rises over `warmup_steps` and then stays, or falls on a cosine to `final_lr_ratio` of itself at the last
    step. `grad_clip` is the largest global norm of the gradient; 0 clips nothing.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-15
    weight_decay: float = 0.0
    warmup_steps: int = 0
    decay: Literal["constant", "cosine"] = "constant"
    final_lr_ratio: float = 0.0
    grad_clip: float = 1.0
    accumulation_steps: int = 1
    ema_decay: float = 0.99


@dataclass(frozen=True)
class RunConfig:
    """How long a training runs and what it leaves behind in `output`."""

    output: str = "outputs"
    steps: int = 1000
    seed: int = 42
    dtype: Precision = "bf16"
    device: str = "auto"
    log_every: int = 10
    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    sample_every: int = 0
    grad_checkpoint: bool = False
    tensorboard: bool = True
    num_threads: int | None = None


@dataclass(frozen=True)
class TrainConfig:
    """`opensora train`: a diffusion transformer on encoded clips, with frame masks of the given probabilities.

    `text_encoder` "" makes a small one from the captions, to be trained with `train_text_encoder`. `cache_latents`
    encodes every clip once, to its posterior mean. `image_ratio` is the share of batches cut to the first frame of each
    clip, which a causal VAE encodes by itself: still images from clips of one length. `sample` is how `sample_prompts`
    are sampled every `run.sample_every` steps.
    """

    transformer: STDiT3Config = field(default_factory=STDiT3Config)
    flow: RectifiedFlowConfig = field(default_factory=RectifiedFlowConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)
    mask_ratios: dict[str, float] = field(default_factory=dict)
    vae: str = ""
    text_encoder: str = ""
    initial_transformer: str | None = None
    train_text_encoder: bool = False
    cache_latents: bool = False
    image_ratio: float = 0.0
    sample_prompts: tuple[str, ...] = ()
    sample: SampleConfig = field(default_factory=SampleConfig)


@dataclass(frozen=True)
class VAELossConfig:
    """Weights of the terms of the stacked VAE's loss; a zero switches its term off."""

    use_real_rec_loss: bool = True
    use_z_rec_loss: bool = False
    use_image_identity_loss: bool = False
    perceptual_weight: float = 0.0
    perceptual_path: str | None = None
    kl_weight: float = 1e-6
    discriminator_start: int = -1


@dataclass(frozen=True)
class TrainVAEConfig:
    """`opensora train-vae`: the stacked VAE; `mixed` makes some clips single frames or of random length.

    `spatial_only` trains the 2-D VAE without the temporal one. `freeze_encoder` trains the decoders alone: latents, and
    transformers trained on them, stay what they are. `initial_log_variance` is where posteriors of a new VAE
    start: at 0, a VAE trained from nothing drowns its small first latents in noise.
    """

    vae: VideoVAEConfig = field(default_factory=VideoVAEConfig)
    loss: VAELossConfig = field(default_factory=VAELossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)
    initial_vae: str | None = None
    freeze_spatial: bool = False
    freeze_encoder: bool = False
    spatial_only: bool = False
    initial_log_variance: float = 0.0
    mixed: Literal["none", "image", "random"] = "none"
    mixed_image_ratio: float = 0.2
    num_statistics_clips: int = 256


@dataclass(frozen=True)
class Preset:
    """A release: where its weights are (folders or hub ids), what it samples by default, and its training stages."""

    name: str
    description: str
    vae: str
    transformer: str
    text_encoder: str
    sample: SampleConfig = field(default_factory=SampleConfig)
    flow: RectifiedFlowConfig = field(default_factory=RectifiedFlowConfig)
    training: dict[str, TrainConfig] = field(default_factory=dict)
    vae_training: dict[str, TrainVAEConfig] = field(default_factory=dict)
