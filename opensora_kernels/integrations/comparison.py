"""Whether a forward computes what a module's own does: both run on the same small input, from one chunk to the next
where there is a cache. `likeness` says for which modules one comparison is enough.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .recipes import Recipe
from .rehearsals import Forward, Rehearsal

# Of the result's scale. fp32 rounds to 1e-7 from layer to layer, as do fp64 models with norms in fp32, bf16 to 4e-3;
# another padding or norm is a good part of the scale away.
_FINE_TOLERANCE, _COARSE_TOLERANCE = 1e-4, 0.05

# Classes whose forward is known to read nothing but what `likeness` looks at.
_KNOWN = ("diffusers.", "torch.nn.modules.")
# Their attributes that are a number of channels and nothing else.
_SIZES = {"in_channels", "out_channels", "num_channels", "channels", "in_features", "out_features", "in_dim", "out_dim"}
_OF_EVERY_MODULE = set(nn.Module().__dict__) - {"training"}
_NUM_COMPARED_VALUES = 4096
"""Of a buffer; a larger one is like itself alone."""


def disagreement(recipe: Recipe, module: nn.Module) -> str | None:
    """How the recipe's results differ from the module's own, as a sentence; None if they agree."""
    weight = _first_weight(module)
    shape = [size or _num_channels(module, weight) for size in recipe.shape]
    return disagreement_on(module, recipe.forward, recipe.rehearse, shape, weight)


def disagreement_on(
    module: nn.Module, forward: Forward, rehearse: Rehearsal, shape: list[int], weight: Tensor
) -> str | None:
    """The same for a `forward` and an input of `shape`, of the dtype and on the device of `weight`."""
    if weight.is_meta:
        return "its weights are on the meta device, so that it can't be compared with ours"
    # its own generator: the model's random numbers stay as they would be
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    try:
        with _as_it_was(module), torch.no_grad():
            module.eval()
            expected = rehearse(module, module.forward, x)
        with _as_it_was(module), torch.no_grad():
            module.eval()
            found = rehearse(module, lambda *args, **options: forward(module, *args, **options), x)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        return f"it is not built like what it resembles: on a small input {type(error).__name__}: {error}"
    tolerance = _FINE_TOLERANCE if weight.dtype in (torch.float32, torch.float64) else _COARSE_TOLERANCE
    if len(found) != len(expected):
        return f"ours leaves {len(found)} results and caches of a small input, its own forward {len(expected)}"
    for theirs, ours in zip(expected, found, strict=True):
        if theirs.shape != ours.shape:
            return f"ours gives the shape {tuple(ours.shape)} for a small input, its own forward {tuple(theirs.shape)}"
        error, scale = (theirs.double() - ours.double()).abs().max().item(), theirs.double().abs().max().item()
        if not error <= tolerance * scale:
            return f"ours differs by {error:.2g} from its own forward on a small input of scale {scale:.2g}"
    return None


def likeness(module: nn.Module, recipe: Recipe) -> tuple[Any, ...] | None:
    """Equal for modules that differ in the number of channels alone, of which one comparison speaks for all.

    None for a module that is compared by itself: it has a part of a class that is neither PyTorch's nor diffusers'.
    """
    if not all(_is_known(part) for part in module.modules()):
        return None
    parts = tuple((name, type(part), *_settings(part)) for name, part in module.named_modules())
    weights = tuple((name, weight.shape[2:], weight.dtype, weight.device) for name, weight in module.named_parameters())
    buffers = tuple((name, buffer.shape, buffer.dtype, _values(buffer)) for name, buffer in module.named_buffers())
    return (id(recipe), parts, weights, buffers)


def _is_known(part: nn.Module) -> bool:
    return type(part).__module__.startswith(_KNOWN)


def _settings(part: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, value in sorted(part.__dict__.items()):
        if name in _OF_EVERY_MODULE:  # the rest of these are hooks
            is_empty = not value or name in ("_parameters", "_buffers", "_modules")
        else:
            # that of an RMS norm is the root of its channels
            is_empty = name in _SIZES or (name == "scale" and "gamma" in part._parameters)
            is_empty = is_empty or (name == "dim" and isinstance(value, torch.Size))
        if not is_empty:
            yield name, _comparable(value)


def _comparable(value: Any) -> Any:
    """The value where it is plain, else its identity."""
    if isinstance(value, (bool, int, float, str, type(None))):
        return type(value), repr(value)
    if isinstance(value, (tuple, list)):
        return type(value), *(_comparable(each) for each in value)
    return id(value)


def _values(buffer: Tensor) -> Any:
    is_small = buffer.numel() <= _NUM_COMPARED_VALUES and not buffer.is_meta
    return repr(buffer.tolist()) if is_small else id(buffer)


@contextmanager
def _as_it_was(module: nn.Module) -> Iterator[None]:
    """Modules keep frames, flags and caches in their own dictionaries, which are given back.

    Meanwhile classes that are not known have other parameters where theirs may hide what they are for, as a factor that
    begins as 0 does. The parameters themselves are not written to.
    """
    kept = [(part, dict(part.__dict__)) for part in module.modules()]
    generator, drawn = torch.Generator().manual_seed(1), {}
    try:
        for part in module.modules():
            if not _is_known(part):
                part.__dict__["_parameters"] = {
                    name: drawn.setdefault(id(parameter), _telling(parameter, generator))
                    for name, parameter in part._parameters.items()
                }
        yield
    finally:
        for part, attributes in kept:
            part.__dict__.clear()
            part.__dict__.update(attributes)


def _telling(parameter: nn.Parameter | None, generator: torch.Generator) -> nn.Parameter | None:
    """The parameter plus noise, if it is a vector, a single number or all zeros; else itself."""
    if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
        return parameter
    num_axes = sum(size > 1 for size in parameter.shape)
    if num_axes > 1 and parameter.any():
        return parameter
    noise = torch.rand(parameter.shape, generator=generator) + 0.5
    noise = noise / max(1, parameter[0].numel()) if num_axes > 1 else noise
    return nn.Parameter(parameter.detach() + noise.to(parameter), requires_grad=parameter.requires_grad)


def _first_weight(module: nn.Module) -> Tensor:
    """Of a convolution if there is one, else of a linear layer."""
    parameters = list(module.parameters())
    kernels = [parameter for parameter in parameters if parameter.dim() >= 4]
    return kernels[0] if kernels else next(parameter for parameter in parameters if parameter.dim() == 2)


def _num_channels(module: nn.Module, weight: Tensor) -> int:
    for name in ("conv1", "conv"):
        inner = getattr(module, name, None)
        if isinstance(inner, nn.Module) and weight.dim() >= 4:
            return _num_channels(inner, _first_weight(inner))
    return weight.shape[1] * getattr(module, "groups", 1)
