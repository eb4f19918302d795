"""What lies in a folder or file: its models, what they are, and whether their keys are complete. Reads no weights."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any

from opensora.config_files import ConfigError
from opensora.families import Family, named_in, recognise
from opensora.family_models import Fit, compare, read_config
from opensora.weight_files import CheckpointError, has_named_weights, loose_weights, weight_files

MAX_DEPTH = 2
_SKIPPED_FOLDERS = re.compile(r"\..*|optimizer|lr_scheduler|sampler")


@dataclass(frozen=True)
class Part:
    """One model of a checkpoint.

    path: its folder or file. entry: under which key of a pickled dictionary it is. config: fields, and where they come
    from. num_values: numbers stored, over `num_tensors` tensors. dtypes: tensors of each. files: bytes of each.
    """

    path: Path
    family: Family | None
    entry: str
    num_tensors: int
    num_values: int
    dtypes: dict[str, int]
    files: dict[str, int]
    config: dict[str, Any] | None = None
    config_source: str | None = None
    fit: Fit = field(default_factory=Fit)


def inspect(path: str | Path) -> list[Part]:
    """The models in a file, or in a folder and its folders, two deep.

    Of several, one that cannot be read says why in its `fit`. Errors: CheckpointError for what is no checkpoint, or a
    damaged one.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise CheckpointError(f"{path}: is no file or folder")
    parts, errors = [], []
    for location in _locations(path):
        try:
            parts.append(_inspect_one(location))
        except CheckpointError as error:
            errors.append(error)
            parts.append(Part(location, None, "", 0, 0, {}, {}, fit=Fit(why_not=str(error))))
    if not parts:
        raise CheckpointError(f"{path}: is no checkpoint: no weights in it, nor in its folders")
    if len(errors) == len(parts):
        raise errors[0]
    return parts


def _locations(path: Path, depth: int = MAX_DEPTH) -> Iterator[Path]:
    """Folders of one model each, and files of weights in folders of several."""
    if path.is_file():
        yield path
        return
    loose = loose_weights(path)
    if has_named_weights(path) or (len(loose) == 1 and (path / "config.json").is_file()):
        yield path
    else:
        yield from loose
    if depth:
        for folder in sorted(each for each in path.iterdir() if each.is_dir()):
            if not _SKIPPED_FOLDERS.fullmatch(folder.name):
                yield from _locations(folder, depth - 1)


def _inspect_one(location: Path) -> Part:
    files = weight_files(location)
    shapes = {name: shape for file in files for name, shape in file.shapes().items()}
    if not shapes:
        raise CheckpointError(f"{location}: is no checkpoint: no tensors in it")
    dtypes = Counter(str(dtype).removeprefix("torch.") for file in files for dtype in file.dtypes().values())
    content = config_beside(location, recognise(shapes))
    family = recognise(shapes, content)
    fit, config, source = _compare(family, content, shapes, location)
    if family is not None and family.name == "LatteT2V" and config and config.get("version") in ("1.0", "1.1"):
        family = replace(family, release=f"Open-Sora-Plan {config['version']}")  # keys alone do not tell
    return Part(
        path=location,
        family=family,
        entry=files[0].entry,
        num_tensors=len(shapes),
        num_values=sum(math.prod(shape) for shape in shapes.values()),
        dtypes=dict(dtypes.most_common()),
        files={file.path.name: file.path.stat().st_size for file in files},
        config=config,
        config_source=source,
        fit=fit,
    )


def _compare(
    family: Family | None, content: dict[str, Any] | None, shapes: dict[str, tuple[int, ...]], location: Path
) -> tuple[Fit, dict[str, Any] | None, str | None]:
    """The fit, the configuration's fields, and where they come from."""
    source = "config.json" if content is not None else "weights"
    if family is None:
        return Fit(why_not="its keys are of no family known here"), content, source if content else None
    try:
        config = read_config(family, content, shapes)
        return compare(family, config, shapes), asdict(config) if is_dataclass(config) else config, source
    except ConfigError as error:
        why_not = str(error) if content is None else f"{_config_path(location)}: {error}"
        return Fit(why_not=why_not), content, source if content else None


def config_beside(location: Path, family: Family | None) -> dict[str, Any] | None:
    """The content of the config.json in a folder, or beside a file; None without, or beside a file of another family.

    Errors: CheckpointError.
    """
    path = _config_path(location)
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must hold an object, got {type(content).__name__}")
    return None if location.is_file() and family is not None and named_in(content) != family else content


def _config_path(location: Path) -> Path:
    return (location if location.is_dir() else location.parent) / "config.json"
