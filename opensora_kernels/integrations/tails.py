"""The ends of encoders and decoders: a norm followed by SiLU, which become one operator.

The forward around them is not ours, so that the norm's forward does both and the activation's gives its input back.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from .comparison import disagreement_on
from .norms import apply_norm, identity_forward, norm_of, norm_silu_forward
from .rehearsals import once

_NORMS = ("norm_out", "conv_norm_out")
_ACTIVATIONS = ("conv_act", "nonlinearity")


def tails_of(model: nn.Module) -> Iterator[tuple[str, Callable[..., Any], str]]:
    """(name, forward, operator) for each norm and each SiLU at the end of an encoder or decoder in `model`."""
    for name, module in model.named_modules():
        for norm_name in _NORMS:
            for activation_name in _ACTIVATIONS:
                norm, activation = getattr(module, norm_name, None), getattr(module, activation_name, None)
                if not _is_pair(norm, activation) or not _follow_directly(module, norm_name, activation_name):
                    continue
                prefix = f"{name}." if name else ""
                operator = "rms_norm_silu" if norm_of(norm).kind == "rms" else "group_norm_silu"
                yield prefix + norm_name, norm_silu_forward, operator
                yield prefix + activation_name, identity_forward, f"{operator} of {norm_name}"


def _is_pair(norm: Any, activation: Any) -> bool:
    if not isinstance(norm, nn.Module) or type(activation) is not nn.SiLU:
        return False
    is_free = not any(part._forward_hooks or part._forward_pre_hooks for part in (norm, activation))
    is_theirs = "forward" not in norm.__dict__ and "forward" not in activation.__dict__
    is_plain = type(norm) is nn.GroupNorm or hasattr(norm, "gamma") or hasattr(norm, "chunk_size")
    return is_free and is_theirs and is_plain and norm_of(norm) is not None and _is_alike(norm)


def _is_alike(norm: nn.Module) -> bool:
    """Whether the norm's own forward computes what `norm_of` takes it for."""
    if type(norm) is nn.GroupNorm:
        return True
    weight = norm_of(norm).weight
    if weight is None:
        return False
    shape = [1, weight.numel(), 3, 4, 4]
    return disagreement_on(norm, lambda m, x: apply_norm(norm_of(m), x, None), once, shape, weight) is None


def _follow_directly(module: nn.Module, norm_name: str, activation_name: str) -> bool:
    """Whether the forward calls the activation once, after the norm, with no arithmetic in between."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(type(module).forward)))
    except (OSError, TypeError):
        return False
    norms, activations, sums = [], [], []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if isinstance(node.func.value, ast.Name) and node.func.value.id == "self":
                norms += [node.lineno] * (node.func.attr == norm_name)
                activations += [node.lineno] * (node.func.attr == activation_name)
        elif isinstance(node, (ast.BinOp, ast.AugAssign)):
            sums.append(node.lineno)
    if not norms or len(activations) != 1 or max(norms) > activations[0]:
        return False
    return not any(min(norms) <= line <= activations[0] for line in sums)
