"""Other people's causal 3-D convolutions: how each pads and where it keeps earlier frames, read from its attributes.

A convention is a function `run(module, x, cache, **fused) -> (result, cache)`, where `fused` are the arguments norm,
activation and residual of `causal_conv3d`, and `cache` is whatever the module's owner hands from chunk to chunk; and
the forward that its module shows to the outside. Attributes are read at each call, since models change them (Mochi's
framewise decoding sets `pad_mode`), and parameters may be moved.
Axes: B batch, C channels, T frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from opensora_kernels.norms import Norm
from opensora_kernels.ops.causal_conv3d import causal_conv3d

from .norms import apply_norm

# What conv3d and F.pad call a padding, and what causal_conv3d does.
_SPACE = {"zeros": "zeros", "constant": "zeros", "replicate": "replicate", "reflect": "reflect"}
_LAST_TAP = slice(-1, None)

Run = Callable[..., tuple[Tensor, Any]]


def convolve(
    conv: nn.Conv3d, x: Tensor, space: tuple[str, Any] | None = None, taps: slice | None = None, **options: Any
) -> Any:
    """`causal_conv3d` with the weights of `conv` (some of its taps in time) and, unless `space` says otherwise, its
    padding in space."""
    mode, pads = space or (conv.padding_mode, _space_pad(conv))
    weight = conv.weight if taps is None else conv.weight[:, :, taps]  # a view of all would be no parameter any more
    return causal_conv3d(
        x, weight, conv.bias, stride=conv.stride, dilation=conv.dilation, groups=conv.groups,
        space_padding=_SPACE[mode], space_pad=pads, **options,
    )  # fmt: skip


def _space_pad(conv: nn.Conv3d) -> tuple[int, int, int, int]:
    _, vertical, horizontal = conv.padding
    return (horizontal, horizontal, vertical, vertical)


def _last_frames(x: Tensor, num_frames: int) -> Tensor:
    return x[:, :, max(0, x.shape[2] - num_frames) :].clone()


# Wan, Qwen-Image: zeros everywhere, earlier frames in a call argument.
def run_padding_tuple(conv: nn.Conv3d, x: Tensor, cache: Tensor | None, **fused: Any) -> tuple[Tensor, Tensor | None]:
    pads, num_front = conv._padding[:4], conv._padding[4]
    if num_front == 0:
        return convolve(conv, x, ("zeros", pads), time_padding="none", **fused), None
    if cache is None and _reads_one_frame(conv, x):
        return _run_first_frame(conv, x, **fused)
    if cache is not None:
        cache = cache.to(x.device)
        if cache.shape[2] < num_front:  # a first chunk of one frame: zeros stand before it
            cache = nn.functional.pad(cache, (0, 0, 0, 0, num_front - cache.shape[2], 0))
    num_seen = x.shape[2] + (0 if cache is None else num_front)
    out, state = convolve(conv, x, ("zeros", pads), time_pad=num_front, state=cache, return_state=True, **fused)
    return out, state if num_seen >= num_front else _last_frames(state, num_seen)


def forward_padding_tuple(self: nn.Module, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
    pads, num_front = self._padding[:4], self._padding[4]
    if cache_x is None and _reads_one_frame(self, x):
        return convolve(self, x, ("zeros", pads), _LAST_TAP, time_padding="none")
    if num_front == 0 or cache_x is None:
        return convolve(self, x, ("zeros", pads), time_pad=num_front)
    return run_padding_tuple(self, x, cache_x)[0]


def _reads_one_frame(conv: nn.Conv3d, x: Tensor) -> bool:
    """Whether x is one frame that the last tap alone reads: the others read the zeros in front of it."""
    return x.shape[2] == 1 and conv._padding[4] == conv.kernel_size[0] - 1 and conv.dilation[0] == 1


def _run_first_frame(
    conv: nn.Conv3d,
    x: Tensor,
    *,
    norm: Norm | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    may_overwrite: bool = False,
) -> tuple[Tensor, Tensor]:
    """A third of the products, and no clip of zeros. The cache is the frame as the convolution reads it.

    Under autocast a norm with weights in fp32 widens x, and the next chunk's x is like this one's.
    """
    hidden = apply_norm(norm, x, activation)
    out = convolve(conv, hidden, ("zeros", conv._padding[:4]), _LAST_TAP, time_padding="none", residual=residual)
    return out, _last_frames(x, 1) if hidden is x else hidden.to(x.dtype)


# HunyuanVideo, HunyuanVideo 1.5, the Hunyuan image refiner: one F.pad for all sides, no cache.
def run_causal_padding(module: nn.Module, x: Tensor, cache: None, **fused: Any) -> tuple[Tensor, None]:
    *pads, num_front, _ = module.time_causal_padding
    time_padding = "zeros" if module.pad_mode == "constant" else "replicate"
    out = convolve(
        module.conv, x, (module.pad_mode, pads), time_padding=time_padding, time_pad=num_front, **fused
    )  # fmt: skip
    return out, None


def forward_causal_padding(self: nn.Module, hidden_states: Tensor) -> Tensor:
    return run_causal_padding(self, hidden_states, None)[0]


# CogVideoX, Mochi: returns its cache; with pad_mode "replicate" it has none.
def run_returned_cache(
    module: nn.Module, x: Tensor, cache: Tensor | None, **fused: Any
) -> tuple[Tensor, Tensor | None]:
    num_front = module.time_kernel_size - 1
    if module.pad_mode == "replicate":
        space = ("replicate", module.time_causal_padding[:4])
        return convolve(module.conv, x, space, time_padding="replicate", time_pad=num_front, **fused), None
    if num_front == 0:
        return convolve(module.conv, x, time_padding="none", **fused), None
    return convolve(
        module.conv, x, time_padding="replicate", time_pad=num_front, state=cache, return_state=True, **fused
    )  # fmt: skip


def forward_returned_cache(
    self: nn.Module, inputs: Tensor, conv_cache: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    return run_returned_cache(self, inputs, conv_cache)


# LTX, LTX-2: copies of the first frame in front or, not causal, of the first and the last on either side.
def run_either_side(
    module: nn.Module, x: Tensor, cache: None, is_causal: bool | None = None, **fused: Any
) -> tuple[Tensor, None]:
    num_front, num_behind = frames_around(module, is_causal)
    if num_behind:  # part of the clip: a norm per position sees them as it sees the last frame
        x = torch.cat([x, x[:, :, -1:].expand(-1, -1, num_behind, -1, -1)], 2)
    return convolve(module.conv, x, time_padding="replicate", time_pad=num_front, **fused), None


def frames_around(module: nn.Module, is_causal: bool | None) -> tuple[int, int]:
    """How many copies of the first frame stand before the clip, and of the last behind it."""
    num_around = module.kernel_size[0] - 1
    is_causal = module.is_causal if is_causal is None else is_causal
    return (num_around, 0) if is_causal else (num_around // 2, num_around // 2)


def forward_either_side(self: nn.Module, hidden_states: Tensor) -> Tensor:
    return run_either_side(self, hidden_states, None)[0]


def forward_either_side_by_argument(self: nn.Module, hidden_states: Tensor, causal: bool = True) -> Tensor:
    return run_either_side(self, hidden_states, None, causal)[0]


# Cosmos: copies of the first frame, zeros around it.
def run_temporal_pad(conv: nn.Conv3d, x: Tensor, cache: None, **fused: Any) -> tuple[Tensor, None]:
    space = (conv.pad_mode, conv.spatial_pad)
    return convolve(conv, x, space, time_padding="replicate", time_pad=conv.temporal_pad, **fused), None


def forward_temporal_pad(self: nn.Module, hidden_states: Tensor) -> Tensor:
    return run_temporal_pad(self, hidden_states, None)[0]


# MiniMax-H3: zeros in front, a mode of its own around.
def run_zeros_in_front(conv: nn.Conv3d, x: Tensor, cache: None, **fused: Any) -> tuple[Tensor, None]:
    space = (conv.spatial_padding_mode, (conv.spatial_padding,) * 4)
    return convolve(conv, x, space, time_pad=conv.temporal_padding, **fused), None


def forward_zeros_in_front(self: nn.Module, hidden_states: Tensor) -> Tensor:
    return run_zeros_in_front(self, hidden_states, None)[0]


# EasyAnimate (Magvit): the module itself holds the last frames that it read.
def run_previous_features(conv: nn.Conv3d, x: Tensor, cache: None, **fused: Any) -> tuple[Tensor, None]:
    num_front, previous = conv.temporal_padding, conv.prev_features
    if conv.t_stride == 1:
        out, conv.prev_features = convolve(
            conv, x, time_padding="replicate", time_pad=num_front, state=previous, return_state=True, **fused
        )
        return out, None
    if previous is None:
        front = x[:, :, :1].expand(-1, -1, num_front, -1, -1)
    else:
        front = previous[:, :, 1:] if conv.t_stride == 2 else previous
    # it keeps as many frames as at stride 1, though the next window begins later
    kept = x if x.shape[2] >= num_front else torch.cat([front, x], 2)
    conv.prev_features = _last_frames(kept, num_front)
    return convolve(conv, x, time_padding="none", state=front, **fused), None


def forward_previous_features(self: nn.Module, hidden_states: Tensor) -> Tensor:
    return run_previous_features(self, hidden_states, None)[0]


# KVAE, Kandinsky 6: a dictionary that the call changes. Its frames are kept without their border, which the operator
# adds again: their owners only ask whether there are any.
def run_changed_dict(module: nn.Module, x: Tensor, cache: dict[str, Any], **fused: Any) -> tuple[Tensor, None]:
    out, cache["padding"] = convolve(
        module.conv, x, _border(module), time_padding="replicate", time_pad=module.time_pad,
        state=cache["padding"], return_state=True, **fused,
    )  # fmt: skip
    return out, None


def _border(module: nn.Module) -> tuple[str, tuple[int, int, int, int]]:
    vertical, horizontal = module.height_pad, module.width_pad
    if hasattr(module, "time_stride"):  # Kandinsky 6
        return "zeros", (horizontal, horizontal, vertical, vertical)
    return "replicate", (vertical, vertical, horizontal, horizontal)  # KVAE swaps them


def forward_changed_dict(self: nn.Module, input: Tensor, cache: dict[str, Any]) -> Tensor:
    return run_changed_dict(self, input, cache)[0]


# VidTok: the module holds all frames that it read, of which the next chunk needs the last `time_pad`.
def run_first_chunk(module: nn.Module, x: Tensor, cache: None, **fused: Any) -> tuple[Tensor, None]:
    num_front = module.time_pad
    state = None if module.is_first_chunk else _last_frames(module.causal_cache, num_front)
    num_ahead = module.cache_offset  # frames at the end that the next chunk brings again
    if num_ahead and fused.pop("activation", None):
        x = nn.functional.silu(x)
    out, following = convolve(
        module.conv, x, (module.pad_mode, module.spatial_padding[:4]), time_padding="replicate",
        time_pad=num_front, state=state, return_state=True, **fused,
    )  # fmt: skip
    if num_ahead:
        front = x[:, :, :1].expand(-1, -1, num_front, -1, -1) if state is None else state
        following = torch.cat([front, x], 2)[:, :, :-num_ahead]
    module.causal_cache = _last_frames(following, num_front)
    return out, None


def forward_first_chunk(self: nn.Module, x: Tensor) -> Tensor:
    return run_first_chunk(self, x, None)[0]


def forward_frames(self: nn.Conv3d, x: Tensor) -> Tensor:
    """A convolution of each frame by itself."""
    return convolve(self, x, time_padding="none")
