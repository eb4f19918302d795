"""Checkpoints from one layout to another: read any, check it against its family, write ours or the released one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from opensora.checkpoints import CheckpointError, replace_files, save_model
from opensora.config import VideoVAEConfig
from opensora.families import Family, find, recognise
from opensora.family_models import OURS, compare, empty_model, read_config
from opensora.inspection import config_beside
from opensora.placements import POSITION_TABLES, Placement, plan
from opensora.weight_files import WeightFile, weight_files

Layout = Literal["ours", "released", "pth"]

# What a text encoder's folder holds beside its weights.
_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "*.model", "generation_config.json")
_RELEASED_NAMES = {"VideoVAE": "VideoAutoencoderPipeline", "CausalVideoVAE": "CausalVAEModel"}


@dataclass(frozen=True)
class Checkpoint:
    """A model on its way: its tensors under the names of its family's model, and its configuration.

    config: a dataclass for our models, for others the content of config.json. location: where it was read. entry: under
    which key of a pickled dictionary.
    """

    family: Family
    state: dict[str, Tensor]
    config: Any
    location: Path
    entry: str = ""


def read_checkpoint(
    location: Path,
    *,
    family: str | None = None,
    config: Mapping[str, Any] | None = None,
    prefer_ema: bool = False,
) -> Checkpoint:
    """Read a checkpoint in any layout and check its keys.

    family: by name, where it is not to be recognised; config: in place of config.json and of what shapes tell.
    Tensors that training alone needs are dropped; position tables stay as they are.
    Errors: CheckpointError for what is no checkpoint, of no known family, or not complete; ConfigError without a
    configuration.
    """
    files = weight_files(location, prefer_ema=prefer_ema)
    shapes = {name: shape for file in files for name, shape in file.shapes().items()}
    content = config if config is not None else config_beside(location, recognise(shapes))
    known = find(family) if family is not None else recognise(shapes, content)
    if known is None:
        raise CheckpointError(f"{location}: is of no family known here; name one with its family")
    configuration = read_config(known, content, shapes)
    places = _places(known, configuration, shapes, location)
    state = {places[name].target: places[name].change(tensor) for name, tensor in _tensors(files) if name in places}
    return Checkpoint(known, state, configuration, location, files[0].entry)


def read_state(location: Path, *, prefer_ema: bool = False) -> dict[str, Tensor]:
    """All tensors of a checkpoint in any layout, as they are. Errors: CheckpointError."""
    return dict(_tensors(weight_files(location, prefer_ema=prefer_ema)))


def _tensors(files: list[WeightFile]) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        yield from file.tensors()


def _places(family: Family, config: Any, shapes: Mapping[str, tuple[int, ...]], location: Path) -> dict[str, Placement]:
    """Where each stored tensor goes that is to be kept. Errors: CheckpointError unless all keys are there."""
    if family.name not in OURS:
        report = compare(family, config, shapes).report
        if report is not None and (report.missing or report.mis_shaped):  # their loaders pass over other keys
            raise CheckpointError(f"{location}: does not fit {family.name}: {report}")
        return {name: Placement(name, shape) for name, shape in shapes.items()}
    model = empty_model(family, config)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    not_loaded = getattr(model, "keys_not_loaded", ())
    stored = {name: shape for name, shape in shapes.items() if not name.startswith(not_loaded)}
    placements, report = plan(stored, wanted)
    if report:
        raise CheckpointError(f"{location}: does not fit {family.name}: {report}")
    return placements | {name: Placement(name, shape) for name, shape in stored.items() if name in POSITION_TABLES}


def write_checkpoint(
    checkpoint: Checkpoint, out: Path, *, layout: Layout = "ours", dtype: torch.dtype | None = None
) -> list[Path]:
    """Write the checkpoint into a folder, or into one file for the layout `pth`; returns what was written.

    ours: config.json with `config_type`, and model.safetensors. released: as its release was: a `.pth` for STDiT and
    PixArt, a folder of transformers' or diffusers' kind for others. Models that are not ours are always written so.
    dtype converts floating-point weights. Files are complete before any takes its name.
    Errors: ValueError when `out` does not end as its layout asks.
    """
    family = checkpoint.family
    if layout == "ours" and family.name not in OURS:
        layout = "released"
    if layout == "pth" or (layout == "released" and family.layout == "pth"):
        return [_write_pth(checkpoint.state, out, dtype)]
    if out.suffix in (".pth", ".pt", ".bin", ".safetensors", ".ckpt"):
        raise ValueError(f"convert: out must be a folder for this layout of {family.name}, got {out}")
    config = checkpoint.config if layout == "ours" else _released_config(family, checkpoint.config)
    file_name = "diffusion_pytorch_model" if layout == "released" and family.layout == "diffusers" else "model"
    save_model(out, checkpoint.state, config, dtype=dtype, stem=file_name)
    if family.name == "T5" and checkpoint.location.is_dir():
        with replace_files(out) as temporary:
            for path in {path for pattern in _TOKENIZER_FILES for path in checkpoint.location.glob(pattern)}:
                shutil.copy(path, temporary / path.name)
    return sorted(path for path in out.iterdir() if path.is_file())


def _write_pth(state: Mapping[str, Tensor], out: Path, dtype: torch.dtype | None) -> Path:
    if out.suffix not in (".pth", ".pt"):
        raise ValueError(f"convert: out must end in .pth or .pt for this layout, got {out}")
    with replace_files(out.parent) as temporary:
        converted = {
            name: tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
            for name, tensor in state.items()
        }
        torch.save(converted, temporary / out.name)
    return out


def _released_config(family: Family, config: Any) -> dict[str, Any]:
    """The content of config.json as upstream writes it; that of models that are not ours as it was read."""
    if not is_dataclass(config):
        return dict(config)
    name = _RELEASED_NAMES.get(family.name, family.name)
    if family.layout == "diffusers":
        return {"_class_name": name, **asdict(config)}
    content = _stacked_vae(config) if isinstance(config, VideoVAEConfig) else asdict(config)
    return {"architectures": [name], "model_type": name, **content}


def _stacked_vae(config: VideoVAEConfig) -> dict[str, Any]:
    content = asdict(config)
    spatial = {"type": "VideoAutoencoderKL", "micro_batch_size": content.pop("micro_batch_size")}
    spatial |= content.pop("spatial")
    return {**content, "vae_2d": spatial, "vae_temporal": {"type": "VAE_Temporal_SD", **content.pop("temporal")}}
