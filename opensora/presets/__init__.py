"""Presets: one module per release, each with `preset()`, `training()` and `vae_training()`."""

from __future__ import annotations

from opensora.config import Preset
from opensora.presets import open_sora_v1_2, tiny

_PRESETS = {"tiny": tiny.preset, "open-sora-v1.2": open_sora_v1_2.preset}


def names() -> list[str]:
    """Every preset's name, the default first."""
    return list(_PRESETS)


def get(name: str) -> Preset:
    """The preset of that name; dots and hyphens count as underscores. Errors: ValueError listing the names."""
    for known, preset in _PRESETS.items():
        if _plain(known) == _plain(name):
            return preset()
    raise ValueError(f"preset: must be one of {', '.join(names())}, got {name!r}")


def _plain(name: str) -> str:
    return name.strip().lower().replace("-", "_").replace(".", "_")
