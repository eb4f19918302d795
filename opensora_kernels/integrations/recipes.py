"""Which forward takes the place of which module: recognised by its attributes, confirmed by running both.

Attributes say what a module might be. What it is, its own forward says: `comparison` runs it and the replacement on the
same small input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from . import blocks, convolutions, decoders, image_blocks, latent_norms, resampling
from .norms import norm_of
from .rehearsals import (
    Forward,
    Rehearsal,
    of_frames,
    of_frames_alone,
    of_odd_and_even,
    of_one_video,
    once,
    twice,
    with_cache_argument,
    with_changed_dict,
    with_either,
    with_embedding,
    with_embedding_of_none,
    with_feature_list,
    with_feature_list_of_decoder,
    with_latent,
    with_latent_and_returned_cache,
    with_layer_cache,
    with_own_cache,
    with_returned_cache,
)


@dataclass(frozen=True)
class Recipe:
    """operators: what the forward runs. rehearse: calls a forward of the module as its owner does and returns every
    result. parts: children whose own forward is not called any more. shape: of the input, (B, C or 0, T, H, W), where 0
    is the channels that the first convolution reads. shows_parts: what is inside is called in other ways than its own
    forward does, which a hook there would see."""

    matches: Callable[[nn.Module], bool]
    forward: Forward
    operators: tuple[str, ...]
    rehearse: Rehearsal
    parts: tuple[str, ...] = ()
    shape: tuple[int, ...] = (1, 0, 3, 6, 6)
    shows_parts: bool = False


def recipe_of(module: nn.Module, more: tuple[Recipe, ...] = ()) -> Recipe | None:
    """The first recipe whose attributes `module` has, of those for convolutions and of `more`."""
    return next((recipe for recipe in (*RECIPES, *more) if recipe.matches(module)), None)


def _has(module: Any, *names: str) -> bool:
    return isinstance(module, nn.Module) and all(hasattr(module, name) for name in names)


def _wraps(module: nn.Module, *names: str) -> bool:
    return _has(module, "conv", *names) and isinstance(module.conv, nn.Conv3d)


def _is_conv3d(module: nn.Module, *names: str) -> bool:
    return isinstance(module, nn.Conv3d) and _has(module, *names)


def _pads_causally(module: nn.Module) -> bool:
    """A border that F.pad gives to all sides and frames at once, with nothing left to the convolution."""
    return (
        _wraps(module, "time_causal_padding", "pad_mode")
        and not _has(module, "time_kernel_size")
        and module.pad_mode in ("replicate", "constant")
        and not any(module.conv.padding)
    )


def _returns_cache(module: nn.Module) -> bool:
    if not _wraps(module, "time_causal_padding", "pad_mode", "time_kernel_size"):
        return False
    conv = module.conv
    return conv.dilation[0] == 1 and (conv.stride[0] == 1 or module.pad_mode == "replicate")


def _takes_either_side(module: nn.Module) -> bool:
    return _wraps(module, "kernel_size") and isinstance(module.kernel_size, tuple) and module.conv.dilation[0] == 1


def _changes_dict(module: nn.Module) -> bool:
    return _wraps(module, "time_pad", "height_pad", "width_pad", "time_kernel_size")


def _pads_frames_only(module: nn.Module) -> bool:
    """A border around each frame is what there is to fuse; patch embeddings have none."""
    return isinstance(module, nn.Conv3d) and module.kernel_size[0] == 1 and any(module.padding)


def _is_block(module: nn.Module, convolution: Callable[[nn.Module], bool], *names: str) -> bool:
    if not _has(module, "norm1", "norm2", "conv1", "conv2", *names):
        return False
    activation = getattr(module, "nonlinearity", None)
    if activation is not None and type(activation) is not nn.SiLU:
        return False
    return convolution(module.conv1) and convolution(module.conv2)


def _normed(module: nn.Module) -> bool:
    return norm_of(module.norm1) is not None and norm_of(module.norm2) is not None


def _normed_or_modulated(module: nn.Module) -> bool:
    return _normed(module) or (_has(module.norm1, "conv_y") and _has(module.norm2, "conv_y"))


def _is_space_and_time(module: nn.Module) -> bool:
    return all(_is_conv3d(getattr(module, name, None), "temporal_pad", "spatial_pad") for name in ("conv_s", "conv_t"))


def _is_wan(module: nn.Module) -> bool:
    return _is_conv3d(module, "_padding") and len(module._padding) == 6


def _is_wan_decoder(module: nn.Module) -> bool:
    names = ("mid_block", "up_blocks", "norm_out", "nonlinearity", "conv_in", "conv_out")
    if not _has(module, *names) or not _is_wan(module.conv_in) or not _is_wan(module.conv_out):
        return False
    # its owner gives it one frame at a time: if no level doubles them there is nothing to take in steps
    return isinstance(module.up_blocks, nn.ModuleList) and decoders.num_levels_in_time(module) > 0


def _is_minimax(module: nn.Module) -> bool:
    return _is_conv3d(module, "spatial_padding", "temporal_padding", "spatial_padding_mode")


def _is_magvit(module: nn.Module) -> bool:
    return _is_conv3d(module, "prev_features", "temporal_padding", "t_stride") and module.temporal_padding > 1


def _is_vidtok(module: nn.Module) -> bool:
    return _wraps(module, "is_first_chunk", "causal_cache", "cache_offset", "time_pad", "spatial_padding")


def _is_ltx_norm(module: nn.Module) -> bool:
    is_last_axis = _has(module, "eps", "dim", "weight", "bias") and module.bias is None
    return is_last_axis or _has(module, "channel_dim")


def _is_temporal_layer(module: nn.Module) -> bool:
    if not _has(module, "down_sample", "up_sample", "conv1", "conv2", "conv3", "conv4"):
        return False
    sequences = (module.conv1, module.conv2, module.conv3, module.conv4)
    return all(
        isinstance(sequence, nn.Sequential)
        and [type(part) for part in sequence if not isinstance(part, nn.Dropout)] == [nn.GroupNorm, nn.SiLU, nn.Conv3d]
        for sequence in sequences
    )


def _is_upsampling(module: nn.Module) -> bool:
    if not (isinstance(module, nn.Sequential) and len(module) == 2 and isinstance(module[0], nn.Upsample)):
        return False
    up, conv = module
    is_nearest = up.mode.startswith("nearest") and up.scale_factor in (2.0, (2.0, 2.0))
    return is_nearest and _is_plain_conv2d(conv, stride=1, padding=1)


def _is_downsampling(module: nn.Module) -> bool:
    if not (isinstance(module, nn.Sequential) and len(module) == 2 and isinstance(module[0], nn.ZeroPad2d)):
        return False
    return tuple(module[0].padding) == (0, 1, 0, 1) and _is_plain_conv2d(module[1], stride=2, padding=0)


def _upsamples_after_first(module: nn.Module) -> bool:
    return (
        _has(module, "conv", "upsample_factor")
        and _pads_plainly(module.conv)
        and module.upsample_factor[0] in (1, 2)
        and tuple(module.upsample_factor[1:]) == (2, 2)
    )


def _pads_plainly(module: nn.Module) -> bool:
    """Copies of the border around a convolution that has no stride, dilation or groups."""
    if not _pads_causally(module) or module.pad_mode != "replicate":
        return False
    conv = module.conv
    return (conv.stride, conv.dilation, conv.groups) == ((1, 1, 1), (1, 1, 1), 1)


def _is_plain_conv2d(conv: nn.Module, stride: int, padding: int) -> bool:
    return (
        type(conv) is nn.Conv2d
        and conv.kernel_size == (3, 3)
        and conv.stride == (stride, stride)
        and conv.padding == (padding, padding)
        and conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
    )


_CHAIN = ("causal_conv3d(norm, silu)", "causal_conv3d(norm, silu, residual)")
_ON_CPU = " on a CPU without gradients"  # else the module's own forward runs
_MODULATED = ("causal_conv3d(silu)", "causal_conv3d(silu, residual)")
_NORMS = ("norm1", "norm2", "nonlinearity")
_SEQUENCES = tuple(f"conv{number}{part}" for number in (1, 2, 3, 4) for part in ("", ".0", ".1", ".2", ".3"))

RECIPES = (
    Recipe(
        lambda m: (
            (_is_block(m, _pads_causally, "conv_shortcut") or _is_block(m, _is_minimax, "conv_shortcut")) and _normed(m)
        ),
        blocks.forward_plain, _CHAIN, once, _NORMS,
    ),
    Recipe(
        lambda m: _is_block(m, _is_wan, "conv_shortcut", "dropout") and _normed(m),
        blocks.forward_feature_list, _CHAIN, with_feature_list, _NORMS,
    ),
    Recipe(
        lambda m: _is_block(m, _returns_cache, "spatial_norm_dim", "dropout") and _normed_or_modulated(m),
        blocks.forward_returned_cache, _CHAIN, with_latent_and_returned_cache, _NORMS,
    ),
    Recipe(
        lambda m: _is_block(m, _returns_cache) and not hasattr(m, "dropout") and _normed(m),
        blocks.forward_returned_cache_mochi, _CHAIN, with_returned_cache, _NORMS,
    ),
    Recipe(
        lambda m: _is_block(m, _is_space_and_time, "conv_shortcut", "dropout") and _normed(m),
        blocks.forward_pairs, _CHAIN, once, (*_NORMS, "conv1", "conv2"),
    ),
    Recipe(
        lambda m: _is_block(m, _is_magvit, "shortcut", "spatial_group_norm", "dropout") and _normed(m),
        blocks.forward_previous_features, _CHAIN, twice, _NORMS,
    ),
    Recipe(
        lambda m: (
            _is_block(m, _changes_dict, "use_conv_shortcut")
            and not hasattr(m, "make_cache")
            and _normed_or_modulated(m)
        ),
        blocks.forward_changed_dict, _CHAIN, with_layer_cache, _NORMS,
    ),
    Recipe(
        lambda m: _is_block(m, _changes_dict, "make_cache") and _normed_or_modulated(m),
        blocks.forward_changed_dict_kandinsky, _CHAIN, with_own_cache, _NORMS,
    ),
    Recipe(
        lambda m: (
            _is_block(m, _takes_either_side, "norm3", "scale_shift_table", "dropout")
            and _is_ltx_norm(m.norm1)
            and _is_ltx_norm(m.norm2)
        ),
        blocks.forward_modulated, ("rms_norm", *_MODULATED), with_embedding, _NORMS,
    ),
    Recipe(
        lambda m: _is_block(m, _is_vidtok, "use_conv_shortcut", "dropout"),
        blocks.forward_first_chunk, _MODULATED, with_embedding_of_none, ("nonlinearity",),
    ),
    Recipe(_is_temporal_layer, blocks.forward_temporal_layer, _CHAIN, of_one_video, _SEQUENCES, (1, 0, 4, 4, 4)),
    Recipe(
        latent_norms.is_latent_norm, latent_norms.forward_latent_norm, ("group_norm_silu",), with_latent,
        ("norm_layer", "conv_y", "conv_y.conv", "conv_b", "conv_b.conv"), (1, 0, 3, 4, 6),
    ),
    Recipe(
        image_blocks.is_image_block, image_blocks.forward_image_block, (_CHAIN[0], _CHAIN[1] + _ON_CPU),
        of_frames_alone, _NORMS,
    ),
    Recipe(
        image_blocks.is_image_upsampling, image_blocks.upsample_image, ("upsample_conv3d" + _ON_CPU,), of_frames,
        ("conv",),
    ),
    Recipe(_is_upsampling, resampling.upsample_frames, ("upsample_conv3d",), of_frames, ("0", "1")),
    Recipe(
        _upsamples_after_first, resampling.upsample_after_first, ("upsample_conv3d",), once, ("conv", "conv.conv"),
        (1, 0, 3, 4, 4),
    ),
    Recipe(
        lambda m: _has(m, "conv", "compress_time") and not _has(m, "norm") and _is_plain_conv2d(m.conv, 1, 1),
        resampling.upsample_then_frames, ("upsample_conv3d",), of_odd_and_even, ("conv",),
    ),
    Recipe(
        lambda m: (
            _has(m, "conv", "temporal_upsample", "prev_features", "spatial_group_norm")
            and _is_magvit(m.conv)
            and m.conv.t_stride == 1
            and m.conv.kernel_size[1:] == (3, 3)
        ),
        resampling.upsample_then_remember, ("upsample_conv3d",), twice, ("conv",),
    ),
    Recipe(
        lambda m: _has(m, "conv", "add_temporal_upsample", "repeats") and _pads_plainly(m.conv),
        resampling.upsample_with_shortcut, ("causal_conv3d",), once, ("conv", "conv.conv"), (1, 0, 3, 4, 4),
    ),
    Recipe(
        _is_wan_decoder, decoders.forward_feature_list, ("a few frames at a time" + _ON_CPU,),
        with_feature_list_of_decoder, ("conv_in", "conv_out"), (1, 0, 2, 2, 3), shows_parts=True,
    ),
    Recipe(blocks.keeps_frames_apart, blocks.forward_frames_apart, ("a few frames at a time",), of_frames_alone),
    Recipe(_is_downsampling, resampling.downsample_frames, ("causal_conv3d",), of_frames, ("0", "1")),
    Recipe(_is_wan, convolutions.forward_padding_tuple, ("causal_conv3d",), with_cache_argument),
    Recipe(_is_minimax, convolutions.forward_zeros_in_front, ("causal_conv3d",), once),
    Recipe(_is_magvit, convolutions.forward_previous_features, ("causal_conv3d",), twice),
    Recipe(
        lambda m: _is_conv3d(m, "temporal_pad", "spatial_pad", "pad_mode"),
        convolutions.forward_temporal_pad, ("causal_conv3d",), once,
    ),
    Recipe(_pads_causally, convolutions.forward_causal_padding, ("causal_conv3d",), once, ("conv",)),
    Recipe(_returns_cache, convolutions.forward_returned_cache, ("causal_conv3d",), with_returned_cache, ("conv",)),
    Recipe(_is_vidtok, convolutions.forward_first_chunk, ("causal_conv3d",), twice, ("conv",)),
    Recipe(
        lambda m: _takes_either_side(m) and hasattr(m, "is_causal"),
        convolutions.forward_either_side, ("causal_conv3d",), once, ("conv",),
    ),
    Recipe(
        lambda m: _takes_either_side(m) and not hasattr(m, "is_causal"),
        convolutions.forward_either_side_by_argument, ("causal_conv3d",), with_either, ("conv",),
    ),
    Recipe(_changes_dict, convolutions.forward_changed_dict, ("causal_conv3d",), with_changed_dict, ("conv",)),
    Recipe(_pads_frames_only, convolutions.forward_frames, ("causal_conv3d",), once),
)  # fmt: skip
