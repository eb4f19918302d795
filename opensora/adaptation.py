"""Start a transformer from the weights of an earlier one: PixArt to STDiT, STDiT2 or STDiT3, and from one to the next.

The order in which Open-Sora trained: PixArt-alpha to 1.0, PixArt-Sigma to 1.2. Upstream's loading rules are those of
`opensora.placements`: what has the same name and shape is loaded, `blocks.` becomes `spatial_blocks.`, the 2-D patch
embedding gets a time axis of one, the null caption is cut or extended, and position tables are dropped. Rules of our
own, which upstream has none for, are said where they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from opensora.config import STDiT2Config, STDiT3Config, STDiTConfig
from opensora.config_files import config_from_dict
from opensora.families import config_from_shapes, recognise
from opensora.models import STDiT, STDiT2, STDiT3
from opensora.placements import POSITION_TABLES, plan, some
from opensora.presets import open_sora_v1_0, open_sora_v1_1

Transformer = STDiT | STDiT2 | STDiT3
TransformerConfig = STDiTConfig | STDiT2Config | STDiT3Config

# What a model can start from.
SOURCES = {
    "STDiT": ("PixArt",),
    "STDiT2": ("PixArt", "STDiT"),
    "STDiT3": ("PixArt", "STDiT", "STDiT2"),
}
MODELS: dict[str, Callable[..., Transformer]] = {"STDiT": STDiT, "STDiT2": STDiT2, "STDiT3": STDiT3}
_CARRIED_FIELDS = (
    "in_channels",
    "patch_size",
    "hidden_size",
    "depth",
    "num_heads",
    "mlp_ratio",
    "pred_sigma",
    "caption_channels",
)


@dataclass(frozen=True)
class Adaptation:
    """Names in the model of what was carried over and of what starts new; names in the source of what was left."""

    source: str
    target: str
    carried: tuple[str, ...]
    new: tuple[str, ...]
    left: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"{self.source} to {self.target}: {len(self.carried)} tensors carried over; "
            f"{_groups(self.new)} start new; {_groups(self.left)} left behind"
        )


def adapted_config(shapes: Mapping[str, tuple[int, ...]], target: str, **changes: object) -> TransformerConfig:
    """The configuration of the `target` model that is as large as the checkpoint of these shapes, otherwise released.

    STDiT is that for 16 x 256 x 256. `changes` replace fields, num_heads where heads are not of 72 channels.
    Errors: ValueError for a checkpoint that `target` cannot start from or without whole heads, ConfigError for a change
    that is none.
    """
    source = _source(shapes, target)
    released: dict[str, TransformerConfig] = {
        "STDiT": open_sora_v1_0.transformer(),
        "STDiT2": open_sora_v1_1.transformer(),
        "STDiT3": STDiT3Config(),
    }
    found = config_from_shapes(source, shapes) or {}
    values = {name: found[name] for name in _CARRIED_FIELDS if name in found} | changes
    if "num_heads" not in values:
        raise ValueError(f"adapt: num_heads must be given: heads of 72 channels do not divide {found['hidden_size']}")
    return config_from_dict(type(released[target]), asdict(released[target]) | values)


def adapt(state: Mapping[str, Tensor], model: Transformer) -> Adaptation:
    """Fill a newly made `model`, in place and in its dtypes, from the state dict of an earlier one.

    What has no source stays as it was initialised. Temporal attention (STDiT, STDiT2) and temporal blocks (STDiT3)
    then add nothing, so that on one frame a model without QK norm is the image model it came from. For this, and
    unlike upstream, STDiT2's embedders of the picture's size begin with a zero last layer, where PixArt has none.

    From STDiT or STDiT2 to STDiT3, which upstream never did, ours is: `attn_temp` becomes the attention of the
    temporal block, and STDiT2's temporal table its first three rows. The frame rate starts without effect as in every
    new STDiT3, and STDiT2's conditions of time (`t_block_temp`, embedders of size, length and rate) have no place.

    Errors: ValueError for a state that the model cannot start from, or of another width or depth.
    """
    target, own = type(model).__name__, model.state_dict()
    source = _source(_shapes(state), target)
    _check_size(config_from_shapes(source, _shapes(state)) or {}, model, source)
    translated, left = dict(state), []
    if target == "STDiT3" and source != "PixArt":
        translated, left = _for_stdit3(state, own)
    placements, report = plan(_shapes(translated), _shapes(own))
    if report.mis_shaped:
        raise ValueError(f"adapt: {source} must have the shapes of {target}, got {some(report.mis_shaped, 4)}")
    carried = {placement.target for placement in placements.values()}
    with torch.no_grad():
        for name, placement in placements.items():
            own[placement.target].copy_(placement.change(translated[name]))
        if isinstance(model, STDiT2):
            for embedder in ("csize_embedder", "ar_embedder"):
                if f"{embedder}.mlp.2.weight" not in carried:
                    own[f"{embedder}.mlp.2.weight"].zero_()
                    own[f"{embedder}.mlp.2.bias"].zero_()
    new = tuple(name for name in own if name not in carried and name not in POSITION_TABLES)
    return Adaptation(source, target, tuple(sorted(carried)), new, (*left, *report.unexpected))


def _for_stdit3(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of STDiT or STDiT2 under STDiT3's names for time, and the names of those without a place there."""
    translated, left = {}, []
    for name, tensor in state.items():
        if name.startswith(("t_block_temp.", "csize_embedder.", "ar_embedder.", "fl_embedder.", "fps_embedder.")):
            left.append(name)  # the two fps_embedders share a name, but not what is done with the result
            continue
        name = re.sub(r"^blocks\.(\d+)\.attn_temp\.", r"temporal_blocks.\1.attn.", name)
        table = re.fullmatch(r"blocks\.(\d+)\.scale_shift_table_temporal", name)
        if table is not None:
            name = f"temporal_blocks.{table[1]}.scale_shift_table"
            # Shift, scale and gate of attention come first in both; those of the MLP are new.
            tensor = torch.cat([tensor, own[name][3:].to(tensor)]) if name in own else tensor
        translated[name] = tensor
    return translated, left


def _source(shapes: Mapping[str, tuple[int, ...]], target: str) -> str:
    if target not in SOURCES:
        raise ValueError(f"adapt: target must be one of {', '.join(SOURCES)}, got {target!r}")
    family = recognise(shapes)
    if family is None or family.name not in SOURCES[target]:
        found = family or "keys of no family known here"
        raise ValueError(f"adapt: {target} can start from {' or '.join(SOURCES[target])}, got {found}")
    return family.name


def _check_size(found: Mapping[str, object], model: Transformer, source: str) -> None:
    for name in ("hidden_size", "depth", "in_channels", "caption_channels"):
        wanted = getattr(model.config, name)
        if found[name] != wanted:
            raise ValueError(f"adapt: {name} of the {source} must be {wanted}, as of the model, got {found[name]}")


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _groups(names: tuple[str, ...]) -> str:
    """Names with their numbers left out, each once: "2 (temporal_blocks.*.attn.proj.weight)"."""
    if not names:
        return "0"
    groups = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name, count=1) for name in names)
    return f"{len(names)} ({some(groups, 40)})"
