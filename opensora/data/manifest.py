"""Lists of clips on disk: CSV, JSONL or Parquet with the columns path, text, num_frames, height, width and fps."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet

from opensora.data.plan_lists import plan_rows
from opensora.data.reading import VideoError, VideoInfo, probe


@dataclass(frozen=True)
class Clip:
    """One usable row. `fps` is the file's frame rate, 0 for a still image; `num_frames` counts frames of the file.

    `aes`, `flow` and `camera_motion` are the row's scores, None where it has none; `first_frame`, where given, is the
    frame at which a training clip begins.
    """

    path: str
    text: str
    num_frames: int
    height: int
    width: int
    fps: float
    aes: float | None = None
    flow: float | None = None
    camera_motion: str | None = None
    first_frame: int | None = None


@dataclass(frozen=True)
class BadRow:
    """A row that was left out: `number` counts data rows from 1, `path` is empty if the row has none."""

    number: int
    path: str
    reason: str


@dataclass(frozen=True)
class Manifest:
    """The usable clips of a file, in its order, and the rows left out."""

    path: str
    clips: tuple[Clip, ...]
    bad_rows: tuple[BadRow, ...]

    def describe(self, *, max_names: int = 10) -> str:
        """One line for a log: how many clips, how many rows left out, and the first of those by name and reason."""
        line = f"{self.path}: {len(self.clips)} clips"
        if self.bad_rows:
            named = "; ".join(f"row {bad.number} {bad.path}: {bad.reason}" for bad in self.bad_rows[:max_names])
            more = f"; and {len(self.bad_rows) - max_names} more" if len(self.bad_rows) > max_names else ""
            line += f", {len(self.bad_rows)} rows left out ({named}{more})"
        return line


def read_manifest(
    path: str | Path,
    *,
    probe_missing: Callable[[str], VideoInfo] = probe,
    empty_captions: Literal["skip", "keep"] = "keep",
) -> Manifest:
    """Read a list of clips; the suffix says the format: .csv, .jsonl, .parquet, or Open-Sora-Plan's .json and .txt.

    Only `path` is required. A missing `text` is empty; missing or empty numbers are read from the clip's file by
    `probe_missing`. Scores are read from columns `aes`, `flow` and `cmotion` or `camera_motion`. Relative paths count
    from the manifest's folder. Other columns are ignored.
    Rows with a bad number, without a path, or whose missing numbers cannot be probed are left out and named in
    `bad_rows`, and so are rows without a text where `empty_captions` is "skip"; a clip whose numbers are all given is
    not touched, so whether its file can be read shows up later.
    Raises ValueError for another suffix, a file without a `path` column, an unreadable file, or no usable row at all;
    FileNotFoundError when there is no such file.
    """
    path = Path(path)
    readers = {".csv": _csv_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
    readers |= {".json": plan_rows, ".txt": plan_rows}
    if path.suffix.lower() not in readers:
        raise ValueError(f"read_manifest: path must end in {', '.join(readers)}, got {str(path)!r}")
    clips: list[Clip] = []
    bad_rows: list[BadRow] = []
    for number, row in enumerate(readers[path.suffix.lower()](path), start=1):
        try:
            clips.append(_clip(row, path.parent, probe_missing, empty_captions))
        except VideoError as error:
            bad_rows.append(BadRow(number, error.path, error.reason))
        except ValueError as error:
            named = row.get("path") if isinstance(row, dict) else None
            bad_rows.append(BadRow(number, str(named or ""), str(error)))
    manifest = Manifest(str(path), tuple(clips), tuple(bad_rows))
    if not clips:
        raise ValueError(f"read_manifest: path must hold at least one usable clip, got {manifest.describe()}")
    return manifest


def _clip(row: Any, folder: Path, probe_missing: Callable[[str], VideoInfo], empty_captions: str) -> Clip:
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row.get("path"), str) or not row["path"].strip():
        raise ValueError("has no path")
    text = "" if _is_missing(row.get("text")) else str(row["text"])
    if not text and empty_captions == "skip":
        raise ValueError("has no text")  # before the file is opened
    path = str(folder / row["path"].strip())
    numbers = {name: _number(row, name) for name in ("num_frames", "height", "width", "fps")}
    if any(value is None for value in numbers.values()):
        info = probe_missing(path)
        numbers = {name: getattr(info, name) if value is None else value for name, value in numbers.items()}
    for name in ("num_frames", "height", "width"):
        if numbers[name] < 1 or numbers[name] != int(numbers[name]):
            raise ValueError(f"{name} must be a whole number from 1, got {numbers[name]}")
        numbers[name] = int(numbers[name])
    motion = row.get("cmotion", row.get("camera_motion"))
    first_frame = _number(row, "first_frame")
    return Clip(
        path=path,
        text=text,
        **numbers,
        aes=_number(row, "aes", least=-math.inf),
        flow=_number(row, "flow", least=-math.inf),
        camera_motion=None if _is_missing(motion) else str(motion).strip(),
        first_frame=None if first_frame is None else int(first_frame),
    )


def _number(row: dict[str, Any], name: str, *, least: float = 0) -> float | None:
    value = row.get(name)
    if _is_missing(value):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or number < least:
        raise ValueError(f"{name} must be a number{' from 0' if least == 0 else ''}, got {value!r}")
    return number


def _is_missing(value: Any) -> bool:
    """Whether a cell is empty; pandas writes empty cells as NaN into Parquet."""
    return (
        value is None or (isinstance(value, str) and not value.strip()) or (isinstance(value, float) and value != value)
    )


def _csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    # utf-8-sig: spreadsheets write a byte-order mark that would become part of the first column's name.
    with path.open(newline="", encoding="utf-8-sig") as file:
        try:
            reader = csv.DictReader(file)
            _require_path_column(path, reader.fieldnames)
            yield from reader
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"read_manifest: path must be a readable CSV file, got {path}: {error}") from error


def _jsonl_rows(path: Path) -> Iterator[dict[str, Any] | ValueError]:
    """One object per line; a line that is not one is handed on as the error, to be counted like any bad row."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            yield ValueError(f"is not JSON: {error}")
            continue
        yield row if isinstance(row, dict) else ValueError(f"must be a JSON object, got {line.strip()[:40]!r}")


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        raise FileNotFoundError(path)
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"read_manifest: path must be a readable Parquet file, got {path}: {error}") from error
    _require_path_column(path, table.column_names)
    yield from table.to_pylist()


def _require_path_column(path: Path, columns: Any) -> None:
    if "path" not in (columns or ()):
        raise ValueError(
            f"read_manifest: path must be a table with a column `path`, got {path} with {list(columns or ())}"
        )
