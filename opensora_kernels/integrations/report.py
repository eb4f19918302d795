"""What a patch changed, what it left alone and why, and how to take it back."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Entry:
    """One module. name: its path in the model, "" for the model itself. operators: what now runs in its place, empty
    if it was left alone. reason: why it was left, or which part of the chain it was."""

    name: str
    module_type: str
    operators: tuple[str, ...] = ()
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.name or '(the model)'} ({self.module_type}): {', '.join(self.operators) or self.reason}"


@dataclass
class Report:
    """The outcome of `apply_opensora_kernels`: one entry for every module of the model, in the model's order.

    is_already_patched: the model had been patched before, and this call changed nothing.
    """

    entries: list[Entry] = field(default_factory=list)
    is_already_patched: bool = False
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    @property
    def replaced(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.operators]

    @property
    def left(self) -> list[Entry]:
        return [entry for entry in self.entries if not entry.operators]

    def undo(self) -> None:
        """Give every module back what it had before this report's patch. A second call does nothing; nor does that of
        an already patched model. What somebody has put on top since stays, with a warning that names the module."""
        while self._undo:
            self._undo.pop()()

    def __str__(self) -> str:
        if self.is_already_patched:
            return "already patched: nothing was changed; undo() of the first report takes the patch back"
        return "\n".join([*self._lines("replaced", self.replaced), *self._lines("left alone", self.left)])

    @staticmethod
    def _lines(title: str, entries: list[Entry]) -> list[str]:
        groups: dict[str, list[Entry]] = {}
        for entry in entries:
            groups.setdefault(", ".join(entry.operators) or entry.reason, []).append(entry)
        lines = [f"{len(entries)} modules {title}"]
        for meaning, group in sorted(groups.items(), key=lambda item: -len(item[1])):
            lines.append(f"  {len(group)} x {meaning}: {', '.join(sorted({entry.module_type for entry in group}))}")
            lines.append(f"      {', '.join(entry.name or '(the model)' for entry in group[:4])}")
            if len(group) > 4:
                lines[-1] += f" and {len(group) - 4} more"
        return lines


def replace_forward(report: Report, name: str, module: nn.Module, forward: Callable[..., Any]) -> None:
    """Put `forward(module, ...)` on this very module, not on its class; `name` is its path in the model.

    A partial, since a bound method is pickled by a name that the module does not have.
    """
    ours = module.__dict__["forward"] = partial(forward, module)

    def undo() -> None:
        if module.__dict__.get("forward") is ours:
            del module.__dict__["forward"]
        elif "forward" in module.__dict__:
            _warn_left(name, "forward")

    report._undo.append(undo)


def set_attribute(report: Report, name: str, owner: Any, attribute: str, value: Any) -> None:
    """Set an attribute that shadows one of the owner's class; undo takes it away again. `name`: the module's path."""
    had, previous = attribute in owner.__dict__, owner.__dict__.get(attribute)
    setattr(owner, attribute, value)

    def undo() -> None:
        if owner.__dict__.get(attribute) is not value:
            _warn_left(name, attribute)
        elif had:
            setattr(owner, attribute, previous)
        else:
            del owner.__dict__[attribute]

    report._undo.append(undo)


def _warn_left(name: str, attribute: str) -> None:
    message = f"undo: {attribute} of {name or 'the model'} has been replaced since the patch, and is left as it is"
    warnings.warn(message, stacklevel=4)


def is_patched(module: nn.Module) -> bool:
    """Whether the module's forward is one that `replace_forward` put there, in this process or before it was saved."""
    forward = module.__dict__.get("forward")
    if not isinstance(forward, partial) or forward.args[:1] != (module,):
        return False
    return getattr(forward.func, "__module__", "").startswith(f"{__package__}.")


def why_untouchable(module: nn.Module) -> str | None:
    """Why nothing of ours may take the place of the module's forward, or None."""
    if "forward" in module.__dict__ and not is_patched(module):
        return "somebody else has replaced its forward"
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has forward hooks, which would not run inside a fused chain"
    return None


def join(name: str, part: str) -> str:
    """The path of a child of the module `name`, "" for the model itself."""
    return f"{name}.{part}" if name else part
