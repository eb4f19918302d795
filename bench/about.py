"""What a figure needs beside it to be believed later: machine, versions, commit and date."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def about_this_run(device: str) -> dict[str, Any]:
    is_cuda = device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if is_cuda else f"{_processor()}, threads: {torch.get_num_threads()}",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": _git("describe", "--always", "--dirty", "--abbrev=12"),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def check_device(parser: argparse.ArgumentParser, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device must be cpu where there is no CUDA device, got cuda")


def json_file(text: str) -> Path:
    """Of an option: its folder is made now, so that hours of measuring do not end in an error."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"must name a file, got the folder {text}")
    output_folder(str(path.parent))
    return path


def output_folder(text: str) -> Path:
    """Of an option, made now for the same reason; its use is the command's."""
    folder = Path(text)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"must be a folder that can be written, got {text}: {error}") from error
    if not os.access(folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"must be a folder that can be written, got {text}")
    return folder


def write_json(path: Path, record: Any, **options: Any) -> None:
    """Whole or not at all."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(record, indent=1, **options) + "\n")
    unfinished.replace(path)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """Its name, and whether it lacks the matrix unit that makes bf16 products eight times as fast."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    told = {key.strip(): text.strip() for key, _, text in (line.partition(":") for line in lines)}
    lacks_amx = "avx512f" in told.get("flags", "") and "amx_bf16" not in told["flags"]
    name = told.get("model name") or platform.processor() or platform.machine()
    return f"{name} without AMX" if lacks_amx else name


def _git(*arguments: str) -> str | None:
    try:
        ran = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return None
    return ran.stdout.strip() if ran.returncode == 0 else None
