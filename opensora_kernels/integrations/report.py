"""What a patch changed, what it left alone and why, and how to take it back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

from torch import nn

# Carried by every forward that is put on a module, so that a second patch of the same model is seen. The key is in the
# function's own dictionary: nothing is written to the module but its forward.
_MARK = "is_of_opensora_kernels"


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
        """Give every module back what it had. A second call does nothing; nor does that of an already patched model."""
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


def replace_forward(report: Report, module: nn.Module, forward: Callable[..., Any]) -> None:
    """Put `forward(module, ...)` on this very module, not on its class."""
    setattr(forward, _MARK, True)
    module.__dict__["forward"] = MethodType(forward, module)
    report._undo.append(lambda: module.__dict__.pop("forward", None))


def set_attribute(report: Report, owner: Any, name: str, value: Any) -> None:
    """Set an attribute that shadows one of the owner's class; undo takes it away again."""
    had, previous = name in owner.__dict__, owner.__dict__.get(name)
    setattr(owner, name, value)
    report._undo.append(lambda: setattr(owner, name, previous) if had else owner.__dict__.pop(name, None))


def is_patched(module: nn.Module) -> bool:
    """Whether the module's forward is one that `replace_forward` put there."""
    return getattr(getattr(module.__dict__.get("forward"), "__func__", None), _MARK, False)
