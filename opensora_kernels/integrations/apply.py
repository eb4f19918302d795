"""Patch other people's video models in place: walk over the modules, replace forwards, report every one."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType
from typing import Any, Literal

from torch import nn

from opensora_kernels.checks import check_choice

from .comparison import disagreement, likeness
from .recipes import Recipe, recipe_of
from .report import Entry, Report, is_patched, join, replace_forward, set_attribute, why_untouchable
from .tails import tails_of

Quality = Literal["lossless", "high"]

_PATCHED = "already patched"


def apply_opensora_kernels(model: nn.Module, *, quality: Quality = "lossless") -> Report:
    """Make the causal convolutions, residual blocks and attention of a video model run on this package's operators.

    Takes: a model of diffusers 0.42, such as `pipe.vae` or `pipe.transformer`, or anybody's module that is built like
    one; it is changed in place. Parameters, state_dict, classes, caches, tiling and hooks stay as they are: only
    forwards of single modules (and attention processors) are replaced, each after its result was compared with the
    module's own on a small input: one comparison for all modules of diffusers' own classes that differ in size alone,
    one for each module of another class. Attributes that are changed later are not compared again. Modules that others
    have hooked into or replaced the forward of are left alone; hooks that come later on a module that is part of a
    replaced one do not run.
    quality: "lossless" rounds where the model rounds; "high" also fuses chains that round elsewhere: the norms of Wan's
    queries and keys.
    Returns a `Report` that names every module, what runs in its place or why it was left; `report.undo()` gives back
    what was there before. Modules that are patched already are not changed: after a patch of `vae.decoder`, that of
    `vae` adds the encoder, and each report takes back its own.
    A patched model can be copied, pickled and saved whole; what loads it needs this package.
    Errors: TypeError unless model is a torch.nn.Module, ValueError for another quality.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"apply_opensora_kernels: model must be a torch.nn.Module, got {type(model).__name__}")
    check_choice("apply_opensora_kernels", "quality", quality, Quality)
    library = _transformers_of(model)
    report, entries, verdicts = Report(), _patched_before(model, library), {}
    was_patched = bool(entries)
    chosen: dict[str, Recipe] = {}
    more = library.recipes(quality) if library else ()
    for name, module in model.named_modules():
        recipe = recipe_of(module, more)
        if recipe is None or is_patched(module):
            continue
        reason = _why_not(module, recipe, verdicts)
        if reason is None:
            chosen[name] = recipe
            for part in recipe.parts:
                entries[join(name, part)] = ((f"part of {type(module).__name__}",), "")
        if name not in entries or reason is None:
            entries[name] = (recipe.operators, "") if reason is None else ((), reason)
    modules = dict(model.named_modules())
    for name, recipe in chosen.items():
        replace_forward(report, name, modules[name], recipe.forward)
    for name, forward, operator in tails_of(model):
        replace_forward(report, name, modules[name], forward)
        entries[name] = ((operator,), "")
    if library:
        backend = library.register_attention_backend()
        for name, processor in library.processors_of(model):
            set_attribute(report, name, processor, "_attention_backend", backend)
            entries.setdefault(name, (("attention",), ""))
    report.is_already_patched = was_patched and not report._undo
    for name, module in modules.items():
        operators, reason = entries.get(name, ((), ""))
        report.entries.append(Entry(*_named(name, module), operators, reason or _why_left(module, operators)))
    return report


def _patched_before(model: nn.Module, library: ModuleType | None) -> dict[str, Any]:
    """Entries of the modules that an earlier patch has changed, and of the parts that they do not call any more."""
    more, entries = library.recipes("high") if library else (), {}
    for name, module in model.named_modules():
        if is_patched(module):
            recipe = recipe_of(module, more)
            for part in ("", *(recipe.parts if recipe else ())):
                entries[join(name, part) if part else name] = ((), _PATCHED)
        elif library and library.has_our_backend(module):
            entries[name] = ((), _PATCHED)
    return entries


def _transformers_of(model: nn.Module) -> ModuleType | None:
    """What is known about diffusers' transformers, imported only for a model that has modules of diffusers' own."""
    if not any(type(module).__module__.startswith("diffusers.models") for module in model.modules()):
        return None
    if importlib.util.find_spec("diffusers.models.attention_dispatch") is None:  # before diffusers 0.35
        return None
    return importlib.import_module(f"{__package__}.diffusers_transformers")


def _why_not(module: nn.Module, recipe: Recipe, verdicts: dict[Any, str | None]) -> str | None:
    reason = why_untouchable(module)
    children = dict(module.named_modules()) if recipe.parts else {}
    for name in [name for name in children if name] if recipe.shows_parts else recipe.parts:
        if reason is None and name in children and why_untouchable(children[name]):
            reason = f"{name}: {why_untouchable(children[name])}"
    if reason is not None:
        return reason
    key = likeness(module, recipe)
    if key is None:
        return disagreement(recipe, module)
    if key not in verdicts:
        verdicts[key] = disagreement(recipe, module)
    return verdicts[key]


def _why_left(module: nn.Module, operators: tuple[str, ...]) -> str:
    if operators:
        return ""
    if isinstance(module, nn.Conv3d):
        if module.kernel_size == (1, 1, 1):
            return "1 x 1 x 1 convolution: one library call, nothing to fuse it with"
        return "this 3-D convolution is not causal: it pads either end of the clip"
    if any(True for _ in module.children()):
        return "its own forward runs, with its parts as listed"
    if any(True for _ in module.parameters(recurse=False)):
        return "no operator of ours takes its place here"
    return "it has no weights and moves or maps single elements"


def _named(name: str, module: nn.Module) -> tuple[str, str]:
    return name, type(module).__name__
