"""losses.csv: a row for each step of a run."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from opensora.training.files import replace_file

NAME = "losses.csv"


class LossTable:
    """Appends rows to `folder`/losses.csv; those after `first_step`, from before a resume, are dropped.

    A value with a new name adds a column, empty in the rows before: validation, say, that begins later.
    """

    def __init__(self, folder: Path, *, first_step: int) -> None:
        self._path = folder / NAME
        rows = [row for row in read_losses(folder) if int(row["step"]) <= first_step]
        self._columns = tuple(rows[0]) if rows else ()
        self._rewrite(rows)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        new = [name for name in values if name not in self._columns]
        if new:
            self.flush()
            rows = read_losses(self._path.parent)
            self._columns = (*(self._columns or ("step",)), *new)
            self._file.close()
            self._rewrite(rows)
        row = (repr(float(values[name])) if name in values else "" for name in self._columns[1:])
        csv.writer(self._file).writerow([step, *row])

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _rewrite(self, rows: Sequence[Mapping[str, str]]) -> None:
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        if self._columns:
            writer.writerow(self._columns)
        writer.writerows([row.get(name, "") for name in self._columns] for row in rows)
        replace_file(self._path, text.getvalue())
        self._file = self._path.open("a", newline="")


def read_losses(folder: str | Path) -> Sequence[dict[str, str]]:
    """The rows of `folder`/losses.csv, as text so that they compare bit for bit; empty when there is none."""
    path = Path(folder) / NAME
    if not path.exists():
        return []
    with path.open(newline="") as file:
        text = file.read()
    # A killed process may leave half a last line.
    return list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline="")))
