"""Forwards of other people's residual blocks, each two chains of norm, SiLU, dropout and convolution with the residual
added by the second convolution; and of the layers that resample between them.

Axes: B batch, C channels, T frames, H height, W width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensora_kernels.ops.rms_norm import rms_norm

from . import convolutions
from .convolutions import Run
from .norms import apply_norm, norm_of
from .steps import a_few_at_a_time, add, frame_steps, may_write


def _chain(
    run: Run,
    conv: nn.Module,
    x: Tensor,
    norm: nn.Module | None,
    cache: Any = None,
    *,
    dropout: nn.Module | None = None,
    residual: Tensor | None = None,
    per_frame: bool | None = None,
    **options: Any,
) -> tuple[Tensor, Any]:
    """conv(dropout(silu(norm(x)))) + residual and the convolution's next cache; `norm` None: x has been normalised.

    Options go to the convolution: `may_overwrite` where x is a block's own.
    """
    found = None if norm is None else norm_of(norm)
    if found is not None and per_frame is not None:
        found = replace(found, per_frame=per_frame)
    if dropout is not None and dropout.training and dropout.p > 0:  # stands between the norm and the convolution
        return run(conv, dropout(apply_norm(found, x, "silu")), cache, residual=residual, **options)
    return run(conv, x, cache, norm=found, activation="silu", residual=residual, **options)


def forward_plain(self: nn.Module, hidden_states: Tensor) -> Tensor:
    """HunyuanVideo, HunyuanVideo 1.5, the Hunyuan image refiner, MiniMax-H3."""
    has_wrappers = hasattr(self.conv1, "conv")
    run = convolutions.run_causal_padding if has_wrappers else convolutions.run_zeros_in_front
    hidden, _ = _chain(run, self.conv1, hidden_states, self.norm1)
    residual = hidden_states if self.conv_shortcut is None else self.conv_shortcut(hidden_states)
    return _chain(
        run, self.conv2, hidden, self.norm2, dropout=getattr(self, "dropout", None), residual=residual,
        may_overwrite=True,
    )[0]  # fmt: skip


def forward_feature_list(
    self: nn.Module, x: Tensor, feat_cache: list[Any] | None = None, feat_idx: list[int] | None = None
) -> Tensor:
    """Wan, Qwen-Image: `feat_cache[feat_idx[0]]` holds a convolution's earlier frames."""
    run = convolutions.run_padding_tuple
    residual = self.conv_shortcut(x)
    for norm, dropout, conv, added in (
        (self.norm1, None, self.conv1, None),
        (self.norm2, self.dropout, self.conv2, residual),
    ):
        if feat_cache is None:
            x, _ = _chain(run, conv, x, norm, dropout=dropout, residual=added, may_overwrite=added is not None)
            continue
        index = feat_idx[0]
        x, feat_cache[index] = _chain(
            run, conv, x, norm, feat_cache[index], dropout=dropout, residual=added, may_overwrite=added is not None
        )
        feat_idx[0] += 1
    return x


def forward_returned_cache(
    self: nn.Module,
    inputs: Tensor,
    temb: Tensor | None = None,
    zq: Tensor | None = None,
    conv_cache: dict[str, Any] | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """CogVideoX: caches go in and come out by name; with a latent `zq`, norms are modulated by it."""
    run, earlier, caches = convolutions.run_returned_cache, conv_cache or {}, {}

    def normed(name: str, x: Tensor) -> tuple[Tensor, nn.Module | None]:
        norm = getattr(self, name)
        if zq is None:
            return x, norm
        x, caches[name] = norm(x, zq, conv_cache=earlier.get(name))
        return x, None

    hidden, caches["conv1"] = _chain(run, self.conv1, *normed("norm1", inputs), earlier.get("conv1"))
    if temb is not None:
        hidden = hidden + self.temb_proj(self.nonlinearity(temb))[:, :, None, None, None]
    hidden, norm2 = normed("norm2", hidden)
    if self.in_channels != self.out_channels:
        if self.use_conv_shortcut:
            inputs, caches["conv_shortcut"] = self.conv_shortcut(inputs, conv_cache=earlier.get("conv_shortcut"))
        else:
            inputs = self.conv_shortcut(inputs)
    hidden, caches["conv2"] = _chain(
        run, self.conv2, hidden, norm2, earlier.get("conv2"), dropout=self.dropout, residual=inputs, may_overwrite=True
    )
    return hidden, caches


def forward_returned_cache_mochi(
    self: nn.Module, inputs: Tensor, conv_cache: dict[str, Any] | None = None
) -> tuple[Tensor, dict[str, Any]]:
    run, earlier, caches = convolutions.run_returned_cache, conv_cache or {}, {}
    hidden, caches["conv1"] = _chain(run, self.conv1, inputs, self.norm1, earlier.get("conv1"))
    hidden, caches["conv2"] = _chain(
        run, self.conv2, hidden, self.norm2, earlier.get("conv2"), residual=inputs, may_overwrite=True
    )
    return hidden, caches


def forward_pairs(self: nn.Module, hidden_states: Tensor) -> Tensor:
    """Cosmos: each convolution is one in space and one in time."""
    run = convolutions.run_temporal_pad
    hidden, _ = _chain(run, self.conv1.conv_s, hidden_states, self.norm1)
    hidden, _ = run(self.conv1.conv_t, hidden, None, may_overwrite=True)
    residual = self.conv_shortcut(hidden_states)
    hidden, _ = _chain(run, self.conv2.conv_s, hidden, self.norm2, dropout=self.dropout, may_overwrite=True)
    return run(self.conv2.conv_t, hidden, None, residual=residual, may_overwrite=True)[0]


def forward_previous_features(self: nn.Module, hidden_states: Tensor) -> Tensor:
    """EasyAnimate (Magvit): the block says whether its norms look at frames alone."""
    run, per_frame = convolutions.run_previous_features, self.spatial_group_norm
    hidden, _ = _chain(run, self.conv1, hidden_states, self.norm1, per_frame=per_frame)
    shortcut = self.shortcut(hidden_states)
    hidden, _ = _chain(
        run, self.conv2, hidden, self.norm2, dropout=self.dropout, residual=shortcut, per_frame=per_frame,
        may_overwrite=True,
    )  # fmt: skip
    return hidden if self.output_scale_factor == 1 else hidden / self.output_scale_factor


def forward_changed_dict(
    self: nn.Module, x: Tensor, temb: Tensor | None, layer_cache: dict[str, Any], zq: Tensor | None = None
) -> Tensor:
    """KVAE: a dictionary of caches that the call changes; with a latent `zq`, norms are modulated by it."""
    run = convolutions.run_changed_dict

    def normed(name: str, x: Tensor) -> tuple[Tensor, nn.Module | None]:
        norm, cache = getattr(self, name), layer_cache[name]
        if zq is not None:
            return norm(x, zq, cache=cache), None
        if cache.get("mean") is None and cache.get("var") is None:  # as its GroupNorm marks that it has seen a chunk
            cache["mean"] = cache["var"] = 1
        return x, norm

    hidden, _ = _chain(run, self.conv1, *normed("norm1", x), layer_cache["conv1"])
    if temb is not None:
        hidden = hidden + self.temb_proj(F.silu(temb))[:, :, None, None, None]
    hidden, norm2 = normed("norm2", hidden)
    if self.in_channels != self.out_channels:
        if self.use_conv_shortcut:
            x = self.conv_shortcut(x, cache=layer_cache["conv_shortcut"])
        else:
            x = self.nin_shortcut(x)
    return _chain(run, self.conv2, hidden, norm2, layer_cache["conv2"], residual=x, may_overwrite=True)[0]


def forward_changed_dict_kandinsky(
    self: nn.Module, hidden_states: Tensor, cache: dict[str, Any], zq: Tensor | None = None
) -> Tensor:
    run, residual = convolutions.run_changed_dict, hidden_states
    if self.in_channels != self.out_channels:
        residual = self.nin_shortcut(hidden_states)

    def normed(name: str, x: Tensor) -> tuple[Tensor, nn.Module | None]:
        norm = getattr(self, name)
        return (x, norm) if zq is None else (norm(x, zq, cache[name]), None)

    hidden, _ = _chain(run, self.conv1, *normed("norm1", hidden_states), cache["conv1"])
    hidden, norm2 = normed("norm2", hidden)
    return _chain(run, self.conv2, hidden, norm2, cache["conv2"], residual=residual, may_overwrite=True)[0]


def forward_modulated(
    self: nn.Module,
    inputs: Tensor,
    temb: Tensor | None = None,
    generator: torch.Generator | None = None,
    causal: bool | None = None,
) -> Tensor:
    """LTX, LTX-2: noise after a convolution, and shift and scale between norm and SiLU, where the block has them."""
    has_noise, has_table = self.per_channel_scale1 is not None, self.scale_shift_table is not None
    residual = inputs
    if self.norm3 is not None:
        residual = self.norm3(inputs.movedim(1, -1)).movedim(-1, 1)
    if self.conv_shortcut is not None:
        takes_causal = causal is not None and not isinstance(self.conv_shortcut, nn.Conv3d)
        residual = self.conv_shortcut(residual, causal) if takes_causal else self.conv_shortcut(residual)
    if has_table:
        table = temb.unflatten(1, (4, -1)) + self.scale_shift_table[None, ..., None, None, None]
        shift_1, scale_1, shift_2, scale_2 = table.unbind(dim=1)

    modulations = ((scale_1, shift_1), (scale_2, shift_2)) if has_table else ((), ())
    hidden = _modulated_chain(self.conv1, inputs, self.norm1, modulations[0], causal)
    if has_noise:
        hidden = add(hidden, _noise(hidden, self.per_channel_scale1, generator))
    hidden = _modulated_chain(
        self.conv2, hidden, self.norm2, modulations[1], causal, dropout=self.dropout,
        residual=None if has_noise else residual, may_overwrite=True,
    )  # fmt: skip
    if not has_noise:
        return hidden
    return add(hidden, _noise(hidden, self.per_channel_scale2, generator), residual)


def _modulated_chain(
    conv: nn.Module,
    x: Tensor,
    norm: nn.Module,
    modulation: tuple[Tensor, ...],
    is_causal: bool | None,
    *,
    dropout: nn.Module | None = None,
    residual: Tensor | None = None,
    may_overwrite: bool = False,
) -> Tensor:
    """conv(dropout(silu(norm(x) * (1 + scale) + shift))) + residual, on a CPU a few frames at a time."""

    def prepared(frames: slice) -> Tensor:
        hidden = _rms_norm_channels(norm, x[:, :, frames])
        return hidden * (1 + modulation[0]) + modulation[1] if modulation else hidden

    num_front, num_behind = convolutions.frames_around(conv, is_causal)
    steps = frame_steps(x, num_behind + 1)
    if len(steps) == 1 or (dropout is not None and dropout.training):
        run = convolutions.run_either_side
        return _chain(run, conv, prepared(slice(None)), None, dropout=dropout, residual=residual, is_causal=is_causal)[
            0
        ]
    out, state, num_done = x if may_overwrite and conv.conv.out_channels == x.shape[1] else None, None, 0
    for frames in steps:
        hidden = prepared(frames)
        if frames is steps[-1] and num_behind:
            hidden = torch.cat([hidden, hidden[:, :, -1:].expand(-1, -1, num_behind, -1, -1)], 2)
        step, state = convolutions.convolve(
            conv.conv, hidden, time_padding="replicate", time_pad=num_front, state=state, return_state=True,
            activation="silu",
        )  # fmt: skip
        results = slice(num_done, num_done + step.shape[2])
        if out is None:
            out = step.new_empty(*step.shape[:2], x.shape[2], *step.shape[3:])
        out[:, :, results] = step if residual is None else step.add_(residual[:, :, results])
        num_done = results.stop
    return out


def _rms_norm_channels(norm: nn.Module, x: Tensor) -> Tensor:
    """LTX normalises the last axis, with eps inside the mean; LTX-2 brings a norm for axis 1 that rounds on the way."""
    if hasattr(norm, "channel_dim"):
        return norm(x)
    return rms_norm(x.movedim(1, -1), norm.weight, eps=norm.eps).movedim(-1, 1)


def _noise(hidden: Tensor, scale: Tensor, generator: torch.Generator | None) -> Tensor:
    noise = torch.randn(hidden.shape[-2:], generator=generator, device=hidden.device, dtype=hidden.dtype)[None]
    return (noise * scale)[None, :, None, ...]


def forward_first_chunk(self: nn.Module, x: Tensor, temb: Tensor | None) -> Tensor:
    """VidTok's blocks in space and time; their LayerNorm runs as it is."""
    run = convolutions.run_first_chunk
    hidden, _ = _chain(run, self.conv1, self.norm1(x), None)
    if temb is not None:
        hidden = hidden + self.temb_proj(self.nonlinearity(temb))[:, :, None, None]
    if self.in_channels != self.out_channels:
        x = self.conv_shortcut(x) if self.use_conv_shortcut else self.nin_shortcut(x)
    return _chain(run, self.conv2, self.norm2(hidden), None, dropout=self.dropout, residual=x)[0]


def keeps_frames_apart(module: nn.Module) -> bool:
    """diffusers' residual block and upsampling of images, with a norm of each image if any."""
    block = ("norm1", "norm2", "conv1", "conv2", "skip_time_act", "time_emb_proj")
    if all(hasattr(module, name) for name in block):
        return module.time_emb_proj is None and type(module.norm1) is type(module.norm2) is nn.GroupNorm
    return all(hasattr(module, name) for name in ("use_conv_transpose", "interpolate")) and module.norm is None


def forward_frames_apart(self: nn.Module, hidden_states: Tensor, *args: Any, **options: Any) -> Tensor:
    """Allegro: the module's own forward of frames (N, C, H, W) that it does not mix, on a CPU a few at a time."""

    def run(frames: Tensor) -> Tensor:
        return type(self).forward(self, frames, *args, **options)

    if self.training or any(each is not None for each in (*args, *options.values())):
        return run(hidden_states)
    return a_few_at_a_time(run, hidden_states)


def forward_temporal_layer(self: nn.Module, hidden_states: Tensor, batch_size: int) -> Tensor:
    """Allegro: four convolutions over frames that look both ways; GroupNorm sees the repeated first and last frame."""
    x = hidden_states.unflatten(0, (batch_size, -1)).permute(0, 2, 1, 3, 4)
    if self.down_sample:
        identity = x[:, :, ::2]
    elif self.up_sample:
        identity = x.repeat_interleave(2, dim=2, output_size=x.shape[2] * 2)
    else:
        identity = x
    is_padded = not (self.down_sample or self.up_sample)
    wide = _repeat_ends(x) if is_padded else None
    x = _convolve_sequence(self.conv1, x if wide is None else wide, may_overwrite=is_padded)
    if self.up_sample:
        x = x.unflatten(1, (2, -1)).permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
    wide = _with_ends(x, wide)
    for sequence, residual in ((self.conv2, None), (self.conv3, None), (self.conv4, identity)):
        wide = _repeat_ends(x) if wide is None else wide
        x = _convolve_sequence(sequence, wide, residual)
        wide = _with_ends(x, wide)
    return x.permute(0, 2, 1, 3, 4).flatten(0, 1)


def _repeat_ends(x: Tensor) -> Tensor:
    return torch.cat([x[:, :, :1], x, x[:, :, -1:]], 2)


def _with_ends(x: Tensor, wide: Tensor | None) -> Tensor | None:
    """`wide` as `_repeat_ends(x)`, if x is what lies between its ends; else None."""
    if wide is None or not may_write(x) or x.untyped_storage()._cdata != wide.untyped_storage()._cdata:
        return None
    wide[:, :, 0], wide[:, :, -1] = x[:, :, 0], x[:, :, -1]
    return wide


def _convolve_sequence(
    sequence: nn.Sequential, x: Tensor, residual: Tensor | None = None, *, may_overwrite: bool = True
) -> Tensor:
    def run(conv: nn.Conv3d, x: Tensor, cache: None, **fused: Any) -> tuple[Tensor, None]:
        return convolutions.convolve(conv, x, time_padding="none", **fused), None

    norm, *_, conv = sequence
    dropout = sequence[2] if len(sequence) == 4 else None
    return _chain(run, conv, x, norm, dropout=dropout, residual=residual, may_overwrite=may_overwrite)[0]
