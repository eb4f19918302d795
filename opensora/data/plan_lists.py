"""Open-Sora-Plan's lists of clips: JSON of annotations, and text files that name such lists and their folders.

Source: Open-Sora-Plan v1.0.0 and v1.1.0, opensora/dataset/t2v_datasets.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESIZED_SUFFIX = "_resize_1080p"


def plan_rows(path: Path) -> Iterator[dict[str, Any] | ValueError]:
    """Rows with path, text and first_frame of a .json list, or of every list that a .txt names, paths made absolute.

    An annotation has `path`, `cap` (a string, or a list of which the first counts) and perhaps `frame_idx`,
    "start:end", of which only the start counts. A line of a .txt is "folder,annotations.json". A sibling
    `name_resize_1080p.mp4` of a video is read in its place.
    Errors: FileNotFoundError for a list that does not exist, ValueError for one that is none.
    """
    if path.suffix.lower() == ".json":
        yield from _annotations(path, path.parent)
        return
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        folder, comma, annotations = (part.strip() for part in line.partition(","))
        if not comma or not annotations:
            raise ValueError(f"read_manifest: {path}, line {number}: must be 'folder,annotations.json', got {line!r}")
        yield from _annotations(path.parent / annotations, path.parent / folder)


def _annotations(path: Path, folder: Path) -> Iterator[dict[str, Any] | ValueError]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"read_manifest: path must be a JSON file, got {path}: {error}") from error
    if not isinstance(entries, list):
        raise ValueError(f"read_manifest: path must hold a list of annotations, got {type(entries).__name__} in {path}")
    yield from (_row(entry, folder) for entry in entries)


def _row(entry: Any, folder: Path) -> dict[str, Any] | ValueError:
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str) or not entry["path"]:
        return ValueError(f"must be an annotation with a path, got {str(entry)[:40]!r}")
    caption = entry.get("cap", "")
    if isinstance(caption, list):
        caption = caption[0] if caption else ""
    video = (folder / entry["path"]).absolute()
    resized = video.with_name(f"{video.stem}{RESIZED_SUFFIX}.mp4")
    row = {"path": str(resized if resized.exists() else video), "text": caption}
    if "frame_idx" in entry:
        start = str(entry["frame_idx"]).partition(":")[0]
        if not start.isdecimal():
            return ValueError(f"frame_idx must be 'start:end', got {entry['frame_idx']!r}")
        row["first_frame"] = int(start)
    return row
