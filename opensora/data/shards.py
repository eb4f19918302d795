"""A folder of encoded clips on disk: shards of tensors, each whole or absent, and what they hold.

    encoding.json            what all of it was made with; other settings are refused
    shards/0000-00003-1f0c42.safetensors, parts/0000-00003-1f0c42.json
                             the fourth shard of rank 0: tensors, and the rows of the index that they belong to, with
                             clips that could not be read; the part is written when its shard is in place
    index.parquet            the rows of all parts, written when every clip is encoded or known to be unreadable

Rows have the columns of the manifest and those of `Row`. An item is (row of the manifest, window).
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

SETTINGS, INDEX = "encoding.json", "index.parquet"
Item = tuple[int, int]
# More than a shard takes on any disk that is worth writing to.
SECONDS_TO_WRITE = 600


@dataclass(frozen=True)
class Row:
    """One encoded clip of the index.

    path, text, num_frames, height, width, fps, aes, flow, camera_motion   of the manifest's row, number `row` of those
                                 that were usable
    window, first_frame, last_frame   which of the clips cut out of that row, and where it lies
    clip_frames, clip_height, clip_width, clip_fps   what was encoded, in frames, pixels and frames per second
    resolution, aspect           its bucket, "" without buckets
    shard, shard_bytes           the file below shards/, and its size
    key, text_key                names in it: key + ".latents" and ".std", text_key + ".y" and ".length"; text_key ""
                                 where no texts are encoded
    """

    path: str
    text: str
    num_frames: int
    height: int
    width: int
    fps: float
    aes: float | None
    flow: float | None
    camera_motion: str | None
    row: int
    window: int
    first_frame: int
    last_frame: int
    clip_frames: int
    clip_height: int
    clip_width: int
    clip_fps: float
    resolution: str
    aspect: str
    key: str
    text_key: str
    shard: str = ""
    shard_bytes: int = 0


@dataclass(frozen=True)
class Unread:
    """A clip that could not be read, and why."""

    row: int
    window: int
    path: str
    reason: str


@dataclass(frozen=True)
class Contents:
    """What a folder holds: `rows` in order of (row, window), `unread` clips, and `damaged` shards with reasons."""

    rows: list[Row]
    unread: list[Unread]
    damaged: dict[str, str]

    @property
    def items(self) -> set[Item]:
        return {(entry.row, entry.window) for entry in (*self.rows, *self.unread)}


def open_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make the folder, or check that it was made with the same settings. Errors: ValueError naming what differs."""
    for name in ("shards", "parts"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS
    if not path.exists():
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(settings, indent=1) + "\n")
    known = read_settings(folder)
    wanted = json.loads(json.dumps(settings))
    for name in (*wanted, *(name for name in known if name not in wanted)):
        if known.get(name) != wanted.get(name):
            raise ValueError(
                f"encode: output must be a new folder or one made with the same {name}, got {folder}, made with "
                f"{_short(known.get(name))}, not {_short(wanted.get(name))}"
            )


def read_settings(folder: Path) -> dict[str, Any]:
    """The content of encoding.json. Errors: ValueError for a folder that has none."""
    try:
        content = json.loads((folder / SETTINGS).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"encoded: must be a folder made by `opensora encode`, got {str(folder)!r}: {error}"
        ) from error
    return content


def read_parts(folder: Path) -> Contents:
    """What is there and whole; a part whose shard is missing or of another size counts as absent."""
    rows: dict[Item, Row] = {}
    unread: dict[Item, Unread] = {}
    damaged: dict[str, str] = {}
    for path in sorted((folder / "parts").glob("*.json")):
        part = json.loads(path.read_text())
        reason = _fault(folder / "shards" / part["shard"], part["bytes"]) if part["shard"] else None
        if reason is not None:
            damaged[part["shard"]] = reason
            continue
        place = {"shard": part["shard"], "shard_bytes": part["bytes"]}
        rows |= {(row["row"], row["window"]): Row(**row, **place) for row in part["rows"]}
        unread |= {(each["row"], each["window"]): Unread(**each) for each in part["unread"]}
    missing = [unread[item] for item in sorted(unread.keys() - rows.keys())]
    return Contents([rows[item] for item in sorted(rows)], missing, damaged)


def write_index(folder: Path, rows: list[Row]) -> None:
    columns = {name: [getattr(row, name) for row in rows] for name in Row.__dataclass_fields__}
    with replacing(folder / INDEX) as temporary:
        pyarrow.parquet.write_table(pyarrow.table(columns), temporary)


def read_index(folder: Path) -> list[Row]:
    """Every encoded clip, in order of (row, window).

    Errors: ValueError for a folder that is not finished, whose index cannot be read, or of which shards are missing or
    cut short.
    """
    path = folder / INDEX
    if not path.exists():
        raise ValueError(
            f"encoded: folder must be finished, got {folder}, which holds {len(read_parts(folder).items)} clips and no "
            f"{INDEX}: run the same `opensora encode` again, it goes on"
        )
    try:
        rows = [Row(**row) for row in pyarrow.parquet.read_table(path).to_pylist()]
    except (pyarrow.ArrowException, OSError, TypeError) as error:
        raise ValueError(f"encoded: {path} must be an index written by `opensora encode`: {error}") from error
    faults = {
        shard: _fault(folder / "shards" / shard, size)
        for shard, size in {row.shard: row.shard_bytes for row in rows}.items()
    }
    damaged = {shard: reason for shard, reason in faults.items() if reason is not None}
    if damaged:
        named = "; ".join(f"{shard} {reason}" for shard, reason in sorted(damaged.items())[:5])
        raise ValueError(
            f"encoded: every shard of {folder} must be whole, got {len(damaged)} that are not ({named}): run the same "
            "`opensora encode` again, it writes them anew"
        )
    return rows


@dataclass
class ShardWriter:
    """Collects encoded clips and writes a shard whenever `max_bytes` of tensors are there.

    Shards are numbered after those that `rank` has in the folder. What is not written when the process dies is not in
    the folder at all. Errors: OSError when a shard cannot be written, for example to a full disk.
    """

    folder: Path
    rank: int
    max_bytes: int
    _rows: list[dict[str, Any]] = field(default_factory=list)
    _unread: list[Unread] = field(default_factory=list)
    _tensors: dict[str, Tensor] = field(default_factory=dict)
    _bytes: int = 0

    def __post_init__(self) -> None:
        """Remove what a process of this rank left that was killed while it wrote, unless one still runs."""
        parts = {path.stem for path in (self.folder / "parts").glob("*.json")}
        for path in [*self.folder.glob(f"*/.{self.rank:04d}-*"), *self.folder.glob(f"shards/{self.rank:04d}-*")]:
            if path.stem not in parts and time.time() - path.stat().st_mtime > SECONDS_TO_WRITE:
                path.unlink(missing_ok=True)

    def add(self, row: Row, tensors: Mapping[str, Tensor]) -> None:
        """`tensors` may hold names that the shard has already: they are of a text that two clips share."""
        for name, tensor in tensors.items():
            if name not in self._tensors:
                self._tensors[name] = tensor.contiguous()
                self._bytes += tensor.numel() * tensor.element_size()
        self._rows.append({name: value for name, value in vars(row).items() if not name.startswith("shard")})
        if self._bytes >= self.max_bytes:
            self.flush()

    def note_unread(self, unread: Unread) -> None:
        self._unread.append(unread)

    def flush(self) -> None:
        if not self._rows and not self._unread:
            return
        name, size = self._next_name(), 0
        shard = f"{name}.safetensors" if self._rows else ""
        if shard:
            path = self.folder / "shards" / shard
            try:
                with replacing(path) as temporary:
                    save_file(self._tensors, temporary)
            except SafetensorError as error:  # how safetensors reports a full disk
                raise OSError(f"encode: cannot write {path}: {error}") from error
            size = path.stat().st_size
        part = {"shard": shard, "bytes": size, "rows": self._rows, "unread": [vars(each) for each in self._unread]}
        with replacing(self.folder / "parts" / f"{name}.json") as temporary:
            temporary.write_text(json.dumps(part))
        self._rows, self._unread, self._tensors, self._bytes = [], [], {}, 0

    def _next_name(self) -> str:
        numbers = [int(path.stem.split("-")[1]) for path in (self.folder / "parts").glob(f"{self.rank:04d}-*.json")]
        # The last part is for two processes of one rank, started by mistake: neither writes over the other's shards.
        return f"{self.rank:04d}-{max(numbers, default=-1) + 1:05d}-{uuid.uuid4().hex[:6]}"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file that takes the name `path`, on disk whole, when the block ends well."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.writing")
    try:
        yield temporary
        # A rename may reach the disk before the data it names.
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _fault(path: Path, num_bytes: int) -> str | None:
    if not path.exists():
        return "is missing"
    size = path.stat().st_size
    return None if size == num_bytes else f"must have {num_bytes} bytes, got {size}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else f"{text[:57]}..."
