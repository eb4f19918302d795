"""Presets: one module per release, with `preset()` and, of those that can be trained, `training()` and the like."""

from __future__ import annotations

import re
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
    """The preset of that name; dots and hyphens count as underscores, and a "v" before a version may be left out.

    Errors: ValueError listing the names.
    """
    for known, preset in _PRESETS.items():
        if _plain(known) == _plain(name):
            return preset()
    raise ValueError(f"preset: must be one of {', '.join(names())}, got {name!r}")


def get_with_stage(name: str) -> tuple[Preset, str | None]:
    """The preset of that name and no stage, or of the name of a preset, a hyphen and that of one of its stages: both.

    Errors: ValueError listing the names, or the stages of the preset that the name begins with.
    """
    plain = _plain(name)
    for known in sorted(_PRESETS, key=len, reverse=True):
        if plain == _plain(known):
            return _PRESETS[known](), None
    for known in sorted(_PRESETS, key=len, reverse=True):
        if plain.startswith(f"{_plain(known)}_"):
            preset = _PRESETS[known]()
            stages = list(dict.fromkeys([*preset.training, *preset.vae_training]))
            for stage in stages:
                if plain == f"{_plain(known)}_{_plain(stage)}":
                    return preset, stage
            raise ValueError(f"preset: stages of {known} are {', '.join(stages) or 'none'}, got {name!r}")
    return get(name), None


def _plain(name: str) -> str:
    return re.sub(r"_v(?=\d)", "_", re.sub(r"[-.]", "_", name.strip().lower()))
