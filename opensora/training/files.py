"""Folders and files that are either whole or absent."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


def replace_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Runs write(temporary folder), then puts that folder in the place of `path`; on failure `path` is untouched.

    Raises what `write` raises, except that a failure inside safetensors becomes an OSError.
    """
    temporary = path.with_name(f".{path.name}.writing")
    replaced = path.with_name(f".{path.name}.replaced")
    for leftover in (temporary, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write(temporary)
        sync_folder(temporary)
        if path.exists():
            path.rename(replaced)
        temporary.rename(path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if replaced.exists() and not path.exists():
            replaced.rename(path)
        if isinstance(error, SafetensorError):  # how safetensors reports a full disk
            raise OSError(str(error)) from error
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def replace_file(path: Path, text: str) -> None:
    """Puts a file with that text in the place of `path`. Errors: OSError; the old file stays then."""
    temporary = path.with_name(f".{path.name}.writing")
    try:
        with temporary.open("w", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # a rename may reach the disk before the data that it names
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_folder(path: Path) -> None:
    """Removes a folder; a kill on the way leaves nothing under its name."""
    leaving = path.with_name(f".{path.name}.removing")
    path.rename(leaving)
    shutil.rmtree(leaving)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def sync_folder(folder: Path) -> None:
    """Waits until the files below `folder` are on the disk.

    A rename may reach the disk before the data it names; after a power cut the folder would hold empty files.
    """
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
