"""What a training starts from: weights of the same model, or of an earlier one; and whether a run can go on."""

from __future__ import annotations

import json
from dataclasses import asdict, is_dataclass
from pathlib import Path

from torch import nn

from opensora.adaptation import SOURCES, adapt
from opensora.checkpoints import load_weights, resolve
from opensora.config import TransformerConfig
from opensora.conversion import read_state
from opensora.families import recognise
from opensora.weight_files import weight_files

# Of a transformer's fields those that may change within a run: what is trained and dropped, not what is computed.
_MAY_CHANGE = {
    "attention_mode",
    "class_dropout_prob",
    "drop_path",
    "dropout",
    "freeze",
    "freeze_y_embedder",
    "only_train_temporal",
}
# Latte's blocks have the names of those of diffusers' PixArt, so its weights load without being translated.
_LOADABLE = {"LatteT2V": ("PixArtTransformer2DModel",)}


def start_from(transformer: nn.Module, source: str | Path) -> str:
    """Copy the weights of `source` into a new transformer; returns what was left out or starts new.

    Weights of the same class are loaded as far as they have a place; those of an earlier model are adapted.
    Errors: CheckpointError for what is no checkpoint or of other shapes, ValueError for a model that this one cannot
    start from.
    """
    location, target = resolve(source), type(transformer).__name__
    family = recognise({name: shape for file in weight_files(location) for name, shape in file.shapes().items()})
    if family is not None and family.name in SOURCES.get(target, ()):
        return str(adapt(read_state(location), transformer))
    if family is not None and family.name not in (target, *_LOADABLE.get(target, ())):
        others = SOURCES.get(target, ()) + _LOADABLE.get(target, ())
        raise ValueError(
            f"initial_transformer: must be a {target} or an earlier model it can start from ({', '.join(others)}), "
            f"got {source}: {family}"
        )
    return str(load_weights(transformer, location, strict=False))


def newest_checkpoint(output: str | Path) -> Path | None:
    """The newest complete checkpoint of a run, as this process sees it."""
    return max((Path(output) / "checkpoints").glob("step-*"), default=None)


def check_resumed(output: str | Path, transformer: TransformerConfig) -> None:
    """Errors: ValueError when the newest checkpoint in `output` is of another model, with the fields that differ."""
    latest = newest_checkpoint(output)
    if latest is None:
        return
    stored = json.loads((latest / "state.json").read_text()).get("config") or {}
    before = stored.get("transformer") if isinstance(stored, dict) else None
    if not isinstance(before, dict) or not is_dataclass(transformer):
        return
    now = json.loads(json.dumps(asdict(transformer)))
    names = sorted((before.keys() | now.keys()) - _MAY_CHANGE)
    changed = [
        f"{name} was {before.get(name, 'absent')}, now {now.get(name, 'absent')}"
        for name in names
        if before.get(name, "absent") != now.get(name, "absent")
    ]
    if changed:
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise ValueError(
            f"resume: {latest} must be of the same model, but in transformer {'; '.join(changed[:5])}{more}; "
            "is it of another preset or stage? initial_transformer starts from its weights"
        )
