"""Presets: one module per release, with `preset()` and, of those that can be trained, `training()` and the like."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from opensora.config import Preset
from opensora.presets import (
    open_sora_plan_v1_0,
    open_sora_plan_v1_1,
    open_sora_v1_0,
    open_sora_v1_1,
    open_sora_v1_2,
    tiny,
)

_PRESETS: dict[str, Callable[[], Preset]] = {
    "tiny": tiny.preset,
    "open-sora-v1.2": open_sora_v1_2.preset,
    "open-sora-v1.1": open_sora_v1_1.preset,
    "open-sora-v1.0": open_sora_v1_0.preset,
    "open-sora-v1.0-16x512x512": partial(open_sora_v1_0.preset, "16x512x512"),
    "open-sora-plan-v1.1": open_sora_plan_v1_1.preset,
    "open-sora-plan-v1.1-221x512x512": partial(open_sora_plan_v1_1.preset, "221x512x512"),
    "open-sora-plan-v1.0": open_sora_plan_v1_0.preset,
    "open-sora-plan-v1.0-65x256x256": partial(open_sora_plan_v1_0.preset, "65x256x256"),
    "open-sora-plan-v1.0-17x256x256": partial(open_sora_plan_v1_0.preset, "17x256x256"),
}


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
