"""Whether a checkpoint is one to go on from, and what has changed since."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from opensora.parallel import ParallelContext
from opensora.training.checkpoint import read_state, shapes_in
from opensora.training.files import replace_file
from opensora.training.players import Player

LAUNCH = "launch.txt"


def check_checkpoint(path: Path, recipe: str, modules: Mapping[str, str], players: Sequence[Player]) -> dict[str, Any]:
    """The state of a checkpoint of the same recipe and models.

    Errors: ValueError for another recipe, other classes of modules, other names or shapes of tensors, and a checkpoint
    that is damaged or of a version without one of these.
    """
    state = read_state(path)
    if missing := [name for name in ("recipe", "modules", "num_updates", "watch") if name not in state]:
        raise ValueError(f"checkpoint: {path} must be of this version, got one without {', '.join(missing)}")
    if state["recipe"] != recipe and state["recipe"] and recipe:
        raise ValueError(
            f"checkpoint: {path} must be of recipe {recipe}, got one of {state['recipe']}; choose another output, or "
            f"--run.recipe {state['recipe']} to go on all the same"
        )
    if state["modules"] != dict(modules):
        raise ValueError(f"checkpoint: {path} must be of {_listed(modules)}, got one of {_listed(state['modules'])}")
    expected: dict[str, tuple[int, ...]] = {}
    for player, num_updates in zip(players, state["num_updates"], strict=True):
        expected |= player.shapes(num_updates)
    try:
        found = shapes_in(path)
    except SafetensorError as error:
        raise ValueError(f"checkpoint: {path} is damaged ({error}); remove it to go on from the one before") from error
    _compare(expected, found)
    return state


def _listed(modules: Mapping[str, str]) -> str:
    return ", ".join(f"{kind} ({name})" for name, kind in modules.items())


def _compare(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    if set(expected) != set(found):
        missing, unexpected = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
        raise ValueError(f"checkpoint: weights must match the model, got missing {missing}, unexpected {unexpected}")
    for name, shape in expected.items():
        if shape != found[name]:
            name_of_weight = name.removeprefix("weights.")
            raise ValueError(f"checkpoint: {name_of_weight} must have shape {shape}, got {found[name]}")


def is_restart_of_this_launch(output: Path, context: ParallelContext) -> bool:
    """Whether the launcher restarts what it has itself started on this output.

    The count of restarts does not say that: it also rises when the first attempt was refused, say for an output that
    holds the checkpoints of an older run.
    """
    path = output / LAUNCH
    return context.num_restarts > 0 and path.exists() and path.read_text() == context.launch


def remember_launch(output: Path, context: ParallelContext) -> None:
    """For `is_restart_of_this_launch`; nothing where there is no launcher."""
    if context.launch:
        output.mkdir(parents=True, exist_ok=True)
        replace_file(output / LAUNCH, context.launch)


def plain(config: Any) -> Any:
    """The configuration as JSON values."""
    if is_dataclass(config) and not isinstance(config, type):
        return plain(asdict(config))
    if isinstance(config, Mapping):
        return {str(key): plain(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [plain(value) for value in config]
    return config


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """One line for each field of two `plain` configurations that differs: "optimizer.lr was 0.1, now 0.2"."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [line for key in keys for line in differences(old.get(key), new.get(key), f"{name}.{key}".strip("."))]
    return [] if old == new else [f"{name} was {old}, now {new}"]
