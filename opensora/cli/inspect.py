"""`opensora inspect`: what a checkpoint is, without reading its weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from opensora.cli.options import Parser
from opensora.presets import tiny

if TYPE_CHECKING:
    from opensora.inspection import Part


def run(arguments: Sequence[str]) -> int:
    parser = Parser(
        "inspect",
        "Say what models a file or folder holds: family, configuration, size, missing and unexpected keys.",
    )
    what = "a file of weights, a model folder, or a folder of these; default: the embedded model"
    parser.add_argument("path", type=Path, nargs="?", default=tiny.ASSETS, help=what)
    options = parser.parse(arguments)

    from opensora.inspection import inspect

    root = Path(options["path"])
    for number, part in enumerate(inspect(root)):
        if number:
            print()
        _print_part(part, root)
    return 0


def _print_part(part: Part, root: Path) -> None:
    place = f"{part.path}" + (f", under {part.entry!r}" if part.entry else "")
    print(f"{place}: {part.family or 'not recognised'}")
    for name, size in part.files.items():
        print(f"  file        {name}, {_size(size)}")
    dtypes = ", ".join(f"{name} ({count})" for name, count in part.dtypes.items())
    print(f"  tensors     {part.num_tensors:,} with {part.num_values:,} values: {dtypes}")
    if part.fit.num_parameters is not None:
        print(f"  parameters  {part.fit.num_parameters:,}")
    if part.config is not None:
        fields = ", ".join(f"{name} {json.dumps(value)}" for name, value in part.config.items() if name[0] != "_")
        print(f"  config      from {part.config_source}: {fields}")
    print(f"  keys        {part.fit.report if part.fit.report is not None else f'not compared: {part.fit.why_not}'}")


def _size(num_bytes: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes} bytes"
