"""Text files that are either old or new, never half written."""

from __future__ import annotations

import os
from pathlib import Path


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
