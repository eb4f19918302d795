"""The ends of encoders and decoders: a norm followed by SiLU, which become one operator.

The forward around them is not ours, so that the norm's forward does both and the activation's gives its input back.
LTX's is a norm of the last axis, with a modulation before the SiLU where there are time steps: the norm alone.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from .comparison import disagreement_on
from .norms import apply_norm, identity_forward, norm_of, norm_of_last_axis_forward, norm_silu_forward
from .rehearsals import once
from .report import is_patched, join, why_untouchable

_NORMS = ("norm_out", "conv_norm_out")
_ACTIVATIONS = ("conv_act", "nonlinearity")


def tails_of(model: nn.Module) -> Iterator[tuple[str, Callable[..., Any], str]]:
    """(name, forward, operator) for each norm and each SiLU at the end of an encoder or decoder in `model`."""
    for name, module in model.named_modules():
        for norm_name in _NORMS:
            if _is_of_last_axis(getattr(module, norm_name, None), module):
                yield join(name, norm_name), norm_of_last_axis_forward, "rms_norm"
            for activation_name in _ACTIVATIONS:
                norm, activation = getattr(module, norm_name, None), getattr(module, activation_name, None)
                if not _is_pair(norm, activation) or not _follow_directly(module, norm_name, activation_name):
                    continue
                operator = "rms_norm_silu" if norm_of(norm).kind == "rms" else "group_norm_silu"
                yield join(name, norm_name), norm_silu_forward, operator
                yield join(name, activation_name), identity_forward, f"{operator} of {norm_name}"


def _is_of_last_axis(norm: Any, module: nn.Module) -> bool:
    names = ("eps", "dim", "weight", "bias", "elementwise_affine")
    if not isinstance(norm, nn.Module) or not all(hasattr(norm, name) for name in names) or norm.bias is not None:
        return False
    weight = next(module.parameters(), None)
    if weight is None or not _is_free(norm):
        return False
    shape = [1, 3, 4, 4, 8 if norm.weight is None else norm.weight.numel()]
    return disagreement_on(norm, norm_of_last_axis_forward, once, shape, weight) is None


def _is_free(module: nn.Module) -> bool:
    return why_untouchable(module) is None and not is_patched(module)


def _is_pair(norm: Any, activation: Any) -> bool:
    if not isinstance(norm, nn.Module) or type(activation) is not nn.SiLU:
        return False
    if not _is_free(norm) or not _is_free(activation):
        return False
    is_plain = type(norm) is nn.GroupNorm or hasattr(norm, "gamma") or hasattr(norm, "chunk_size")
    return is_plain and norm_of(norm) is not None and _is_alike(norm)


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
