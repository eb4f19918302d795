"""What LatteT2V can't be made of, or be given."""

from __future__ import annotations

from torch import Tensor

from opensora.config import LatteT2VConfig

# What a configuration may say elsewhere, but not of this model.
_ONLY = {
    "num_vector_embeds": None,
    "patch_size_t": 1,
    "activation_fn": "gelu-approximate",
    "only_cross_attention": False,
    "double_self_attention": False,
    "upcast_attention": False,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "attention_type": "default",
}


def check_config(config: LatteT2VConfig) -> None:
    for name, value in _ONLY.items():
        if getattr(config, name) != value:
            raise ValueError(f"LatteT2V: {name} must be {value!r}, got {getattr(config, name)!r}")
    dim = config.num_attention_heads * config.attention_head_dim
    if config.cross_attention_dim != dim:
        raise ValueError(
            f"LatteT2V: cross_attention_dim must be heads x head size = {dim}, got {config.cross_attention_dim}"
        )
    if dim % 4 or (config.use_rope and config.attention_head_dim % 4):
        raise ValueError(
            "LatteT2V: heads x head size, and with use_rope the head size, must be a multiple of 4, "
            f"got {config.num_attention_heads} x {config.attention_head_dim}"
        )
    if config.compress_kv_factor < 1 or (config.use_rope and config.compress_kv_factor > 1):
        raise ValueError(
            "LatteT2V: compress_kv_factor must be at least 1, and 1 with use_rope, "
            f"got {config.compress_kv_factor} and use_rope={config.use_rope}"
        )
    if config.version == "1.0" and (config.use_rope or config.compress_kv_factor > 1):
        raise ValueError(
            "LatteT2V: version must be '1.1' for use_rope and compress_kv_factor, "
            f"got '1.0' with {config.use_rope} and {config.compress_kv_factor}"
        )


def check_captions(config: LatteT2VConfig, y: Tensor) -> None:
    if y.ndim != 4 or y.shape[1] != 1 or y.shape[3] != config.caption_channels:
        raise ValueError(f"LatteT2V: y must have shape (R, 1, L, {config.caption_channels}), got {tuple(y.shape)}")


def check_clip(config: LatteT2VConfig, x_BCTHW: Tensor, timestep: Tensor, num_texts: int, *, is_temporal: bool) -> None:
    check_latents(config, x_BCTHW)
    batch, _, num_frames, *_ = x_BCTHW.shape
    if is_temporal and num_frames != config.video_length:
        raise ValueError(
            f"LatteT2V: clips must have video_length = {config.video_length} latent frames, or temporal attention "
            f"must be off, got {num_frames}"
        )
    if is_temporal and num_frames % 2 == 0 and num_frames < config.compress_kv_factor:
        raise ValueError(
            f"LatteT2V: clips must have an odd number of frames or at least {config.compress_kv_factor}, the factor of "
            f"compressed keys, got {num_frames}"
        )
    if timestep.shape != (batch,):
        raise ValueError(f"LatteT2V: timestep must have shape ({batch},), got {tuple(timestep.shape)}")
    if num_texts % batch:
        raise ValueError(f"LatteT2V: texts must be a multiple of the batch of {batch} clips, got {num_texts}")


def check_latents(config: LatteT2VConfig, x_BCTHW: Tensor) -> None:
    shape, smallest = tuple(x_BCTHW.shape), config.patch_size * config.compress_kv_factor
    if len(shape) != 5 or shape[1] != config.in_channels or 0 in shape:
        raise ValueError(f"LatteT2V: latents must have shape (B, {config.in_channels}, T, H, W), got {shape}")
    if any(size % config.patch_size for size in shape[3:]) or min(shape[3:]) < smallest:
        raise ValueError(
            f"LatteT2V: height and width of latents must be multiples of {config.patch_size} and at least {smallest}, "
            f"got {shape[3:]}"
        )


def check_batch(
    config: LatteT2VConfig,
    x_BCTHW: Tensor,
    text: Tensor,
    text_mask: Tensor | None,
    mask: Tensor | None,
    num_images: int,
) -> None:
    check_latents(config, x_BCTHW)
    batch, _, num_frames, height, width = x_BCTHW.shape
    if not 0 <= num_images < num_frames:
        raise ValueError(
            f"LatteT2V: use_image_num must be at least 0 and less than all {num_frames} frames, got {num_images}"
        )
    texts = [(batch, 1 + num_images)] if num_images else [(batch,), (batch, 1)]
    have, channels = tuple(text.shape), config.caption_channels
    if have[:-2] not in texts or have[-1] != channels:
        wanted = " or ".join(f"({', '.join(map(str, rows))}, L, {channels})" for rows in texts)
        raise ValueError(f"LatteT2V: encoder_hidden_states must have shape {wanted}, got {have}")
    if text_mask is not None and text_mask.shape not in [(*rows, have[-2]) for rows in texts]:
        wanted = " or ".join(str((*rows, have[-2])) for rows in texts)
        raise ValueError(f"LatteT2V: encoder_attention_mask must have shape {wanted}, got {tuple(text_mask.shape)}")
    if mask is None:
        return
    if config.version == "1.0" and num_images:
        raise ValueError(
            f"LatteT2V: attention_mask must be None with images in version 1.0, got one and {num_images} images"
        )
    num_patches = height * width // config.patch_size**2
    wanted = (batch * num_frames, num_patches) if config.version == "1.0" else (batch, num_frames, height, width)
    if mask.shape != wanted:
        raise ValueError(
            f"LatteT2V: attention_mask must have shape {wanted} in version {config.version}, got {tuple(mask.shape)}"
        )
