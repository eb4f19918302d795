"""What a run folder says of how its run was started: config.json and environment.json."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from opensora.training.files import replace_file
from opensora.training.resuming import differences, plain
from opensora_kernels import __version__

_PACKAGES = ("triton", "numpy", "diffusers", "transformers", "safetensors")


def write_run_record(
    folder: str | Path,
    config: Any,
    *,
    device: torch.device | str = "cpu",
    world_size: int = 1,
    num_hosts: int = 1,
    first_step: int = 0,
) -> None:
    """Writes `folder`/config.json, the resolved configuration, and adds this start to `folder`/environment.json.

    config: a dataclass or a mapping. environment.json is a list with an entry for each start, resumes included: date
    (UTC), command line, commit of the source if it is a git checkout, versions, device, ranks and hosts, the step after
    which the run began, and which fields of the configuration changed since the start before. Names of hosts and
    environment variables are left out. Call on the main rank alone. Errors: OSError where it cannot be written;
    ValueError for an environment.json that is no list.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    resolved = plain(config)
    environment_path, config_path = folder / "environment.json", folder / "config.json"
    starts = json.loads(environment_path.read_text()) if environment_path.exists() else []
    if not isinstance(starts, list):
        raise ValueError(f"{environment_path}: must hold a list of starts, got {type(starts).__name__}")
    changes = differences(json.loads(config_path.read_text()), resolved) if config_path.exists() else []
    run = {"first_step": first_step, "world_size": world_size, "num_hosts": num_hosts, "config_changes": changes}
    replace_file(environment_path, _json([*starts, describe_environment(device) | run]))
    replace_file(config_path, _json(resolved))


def describe_environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Date, command, commit, versions and device of this process, as JSON values."""
    device = torch.device(device)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": list(sys.orig_argv),  # recorded, not read: options reach us as a configuration
        "commit": source_commit(),
        "opensora_kernels": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **{package: _version(package) for package in _PACKAGES},
        "device": str(device),
        "device_name": _device_name(device),
        "num_threads": torch.get_num_threads(),
    }


def source_commit() -> str | None:
    """The commit of the installed source, with "-dirty" if files differ from it; None where it is no git checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):  # no git, or a checkout of another user
        return None
    return found.stdout.strip()


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, default=str) + "\n"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()
