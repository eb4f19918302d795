"""Rules for attention: by sample, or along time with the keys and values of earlier frames kept.

Axes: L tokens, D head size.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import programs
from .graph import Node, TimeAxis, nodes_of
from .spill import Spill
from .step import Step
from .streams import Run, pull_chunks


def scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """PyTorch's, but on paper without the matrix of scores, which its kernels do not keep."""
    if q.is_meta:
        return q.new_zeros(*q.shape[:-1], v.shape[-1])
    return F.scaled_dot_product_attention(q, k, v, *args, **kwargs)


def attention(step: Step) -> Node | None:
    """F.scaled_dot_product_attention: axes before the last two by themselves; queries too, if keys are at hand."""
    axis = step.common_axis()
    num_axes = step.result.dim()
    if axis is None or any(len(node.shape) != num_axes for node in step.inputs[:3]):
        return None
    is_stream = [node.axis is not None for node in step.inputs]
    if all(is_stream) and axis.dim < num_axes - 2 and len(step.inputs) == 3:
        return step.each_chunk(axis)
    if axis.dim != num_axes - 2 or step.call.slots[:1] != [0]:
        return None
    if all(is_stream[:3]) and step.call.slots[:3] == [0, 1, 2] and axis.outer == 1:
        return _along_time(step, axis)
    plain = len(step.args) == 3 and not step.kwargs.get("is_causal") and step.kwargs.get("attn_mask") is None
    return step.each_chunk(axis) if is_stream[0] and not any(is_stream[1:]) and plain else None


def _along_time(step: Step, axis: TimeAxis) -> Node | None:
    """Attention among the frames of a clip, where a mask hides later ones."""
    options = dict(zip(("attn_mask", "dropout_p", "is_causal"), step.args[3:], strict=False)) | step.kwargs
    mask, is_causal = options.pop("attn_mask", None), options.pop("is_causal", False)
    if options.pop("dropout_p", 0.0):
        return None
    seen = list(range(1, axis.frames + 1)) if is_causal else _keys_seen(mask, axis.frames)
    if seen is None or seen[0] == axis.frames:
        return None
    mask_node = getattr(mask, "node", None)
    given = mask if mask_node is None else None

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, start: int) -> Tensor:
        stop, num_keys = start + q.shape[-2], k.shape[-2]
        if is_causal:
            rows = q.new_ones(q.shape[-2], num_keys, dtype=torch.bool).tril(start)
        else:
            rows = mask[..., start:stop, :num_keys]
        return scaled_dot_product_attention(q, k, v, rows, **options)

    inputs = (*step.inputs[:3], *([] if mask_node is None else [mask_node]))
    node = step.node(programs.attended(run, seen, given), axis, inputs=inputs)
    node.remark = "attention looks back: keys and values of all earlier frames are kept"
    return node


def _keys_seen(mask: Any, num_keys: int) -> list[int] | None:
    """How many keys each query and those before it need; None if the mask's values are not at hand."""
    node = getattr(mask, "node", None)
    if node is not None:
        if any(found.name == "clip" for found in nodes_of(node)):
            return None
        empty = torch.empty(0, dtype=node.dtype)  # of a clip nothing is read but where it is
        (mask,) = pull_chunks(node, Run(empty, Fraction(1), lambda tensor: tensor), Spill())
    if not isinstance(mask, Tensor) or mask.is_meta or mask.shape[-2:] != (num_keys, num_keys):
        return None
    visible = mask if mask.dtype is torch.bool else mask > -torch.inf
    visible = visible.flatten(0, -3).any(0) if visible.dim() > 2 else visible
    hidden_behind = visible.flip(-1).to(torch.uint8).argmax(-1)  # 0 for a row that sees nothing: it waits for all
    return torch.cummax(num_keys - hidden_behind, 0).values.tolist()
