"""The rules of the rooms: which file may import which, read from the source without running it.

`opensora_kernels` stands alone; `opensora` is made of leaf rooms that do not know each other and of a few files that
join them. To add a room, add its line to ROOMS.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import opensora_kernels

ROOT = Path(__file__).parents[1]
MAX_LINES = 450

# Files of opensora and folders of files -> what else in opensora they may import.
_ALONE = ("config", "video", "weight_files", "perceptual", "families", "placements", "device_memory")
_FILES = {name: set() for name in _ALONE}
_FILES |= {"config_files": {"config"}, "parallel": {"config"}, "metrics": {"perceptual"}}
_CHECKPOINTS = {"checkpoints": {"config", "config_files", "families", "placements", "weight_files"}}
_LEAF_ROOMS = {room: {"config"} for room in ("data", "vae", "text", "models", "schedulers", "conditioning")}
_BESIDE_THEM = {"training": {"config", "parallel", "device_memory"}, "presets": {"config", "data"}}
_BELOW = _FILES | _CHECKPOINTS | _LEAF_ROOMS | _BESIDE_THEM
_MODELS = {
    "family_models": {"config", "config_files", "families", "models", "placements", "vae"},
    "inspection": {"config_files", "families", "family_models", "weight_files"},
    "adaptation": {"config", "config_files", "families", "models", "placements", "presets"},
    "conversion": {*_FILES, *_CHECKPOINTS, "adaptation", "families", "family_models", "inspection", "placements"},
}
_JOINTS = {
    "inputs": {"conditioning", "config", "data", "text"},
    "latents": {"config", "data", "inputs", "parallel", "training"},
    "validation": {"config", "data", "inputs", "parallel", "schedulers"},
    "initial_weights": {"adaptation", "checkpoints", "config", "conversion", "families", "weight_files"},
    "sampling": {"config", "conditioning", "data", "device_memory", "schedulers", "text"},
    "loading": {"checkpoints", "config", "family_models", "parallel", "text", "vae"},
    "encoding": {"config", "data", "inputs", "text"},
    "bucket_sizes": {"checkpoints", "config", "data", "loading", "schedulers", "vae"},
    "tiny_parts": {"checkpoints", "config", "data", "models", "presets", "vae", "video"},
    "sampler": {*_BELOW, "loading", "sampling"},
    "trainer": {
        *_BELOW,
        "encoding",
        "estimate",
        "inputs",
        "initial_weights",
        "latents",
        "loading",
        "sampler",
        "validation",
    },
    "vae_trainer": {*_BELOW},
    "reconstruction": {"checkpoints", "config", "config_files", "vae", "video"},
    "estimate": {"config", "config_files", "data", "loading", "parallel", "presets", "training", "vae"},
}
_INSIDE = _BELOW | _MODELS | _JOINTS
ROOMS: dict[str, set[str]] = _INSIDE | {"cli": {*_INSIDE}, "__main__": {"cli"}, "__init__": set()}
# The data set of the embedded model writes video as well as reading it.
EXCEPTIONS = {("opensora/data/tiny_dataset.py", "video")}

OP_PARTS = {"__init__.py", "reference.py", "cases.py"}
OTHER_OP_PARTS = {f"{backend}.py" for backend in ("library", "cpu", "triton_kernel", "cuda_kernel", "npu")}
ROOT_FILES_OF_A_REFERENCE = {"norms", "causal_padding", "modulation", "shards"}
# Folders of opensora_kernels that join operators, which root files may not: they are exported like operators, but have
# no backends of their own. sequence_parallel: attention between ranks is packing, an exchange and attention. vae:
# models made of operators, run on clips of any length. integrations: operators inside other people's models.
KERNEL_ROOMS = {"sequence_parallel", "vae", "integrations"}
# Counts as a root file: what the Triton kernels of several operators share.
ROOT_FOLDERS = {"_triton"}
ONLY_ELSEWHERE = {"complex64", "complex128", "float64", "double", "cuda", "view_as_complex"}
READ_ENVIRONMENT = {
    "opensora_kernels/backends.py",
    "opensora_kernels/_triton/__init__.py",
    "opensora/parallel.py",  # torchrun's variables
}


def sources(*folders: str) -> dict[str, str]:
    return {
        str(path.relative_to(ROOT)): path.read_text()
        for folder in folders
        for path in sorted((ROOT / folder).rglob("*.py"))
    }


def faults(path: str, source: str) -> list[str]:
    """What the file at `path`, relative to the root, does against the rules."""
    tree = ast.parse(source)
    imported = list(_imports(tree, path))
    if path.startswith("opensora_kernels/"):
        found = [_fault_of_kernel_import(path, target) for target in imported]
    else:
        found = [_fault_of_model_import(path, target) for target in imported]
    return [f"{path}: {fault}" for fault in (*found, *_faults_of_names(path, tree)) if fault]


def _imports(tree: ast.Module, path: str) -> Iterator[str]:
    """Everything that a file imports, anywhere in it, as absolute dotted names."""
    package = list(Path(path).parent.parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            parts = [*base, *([node.module] if node.module else [])]
            yield from (".".join([*parts, alias.name]) for alias in node.names)


def _fault_of_model_import(path: str, target: str) -> str | None:
    package, *names = target.split(".")
    if package == "opensora_kernels" and names[0] == "vae" and names[1] in opensora_kernels.vae.__all__:
        return None
    if package == "opensora_kernels" and (len(names) > 1 or names[0] not in opensora_kernels.__all__):
        return f"imports {target}, which is no public name of opensora_kernels"
    here = Path(path).parts[1].removesuffix(".py")
    if package in ("argparse", "jsonargparse") and here != "cli":
        return f"imports {target}, but only cli reads arguments"
    if package != "opensora":
        return None
    if here not in ROOMS:
        return f"is a new room: say in {Path(__file__).name} what it may import"
    if names[0] == here or names[0] in ROOMS[here] or (path, names[0]) in EXCEPTIONS:
        return None
    return f"imports {target}, but {here} may import only {sorted(ROOMS[here])}"


def _fault_of_kernel_import(path: str, target: str) -> str | None:
    package, *names = target.split(".")
    _, *folders, file = Path(path).parts
    if package == "opensora":
        return f"imports {target}, but opensora_kernels must work without opensora"
    if file == "reference.py" and package not in ("torch", *sys.stdlib_module_names):
        is_allowed = package == "opensora_kernels" and names[0] in ROOT_FILES_OF_A_REFERENCE
        allowed = sorted({"torch", *ROOT_FILES_OF_A_REFERENCE})
        return None if is_allowed else f"imports {target}, but a reference may import only {allowed}"
    if package != "opensora_kernels" or file == "__main__.py":
        return None
    room = folders[0] if folders else None
    is_export = room is None and file == "__init__.py"
    if names[0] in KERNEL_ROOMS:
        return None if is_export or room == names[0] else f"imports {target}, but operators know no room"
    if names[0] != "ops":
        root = ROOT / "opensora_kernels" / names[0]
        is_root_file = root.with_suffix(".py").exists() or names[0] in {"__version__", *ROOT_FOLDERS}
        return None if is_root_file else f"imports {target}: name the file that defines it"
    if room not in {"ops", *KERNEL_ROOMS}:
        return None if is_export else f"imports {target}, but root files know no operator"
    is_of_this_op = room == "ops" and names[1] == folders[1]
    is_public = len(names) == 3 and not (ROOT / "/".join(("opensora_kernels", *names))).with_suffix(".py").exists()
    if is_of_this_op or (is_public and not names[2].startswith("_")):
        return None
    return f"imports {target}, but of other operators only public functions"


def _faults_of_names(path: str, tree: ast.Module) -> Iterator[str]:
    reads_arguments = path.startswith("opensora/cli/")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = f"{node.value.id}.{node.attr}"
            if name == "sys.argv" and not reads_arguments:
                yield "reads sys.argv outside opensora/cli"
            if name in ("os.environ", "os.getenv") and not (reads_arguments or path in READ_ENVIRONMENT):
                yield f"reads {name} outside opensora/cli"
        if path.endswith("/reference.py") and isinstance(node, ast.Attribute) and node.attr in ONLY_ELSEWHERE:
            yield f"uses {node.attr}, which a reference for the CPU and Ascend must not"


def test_every_import_keeps_to_the_rules():
    assert not [fault for path, text in sources("opensora_kernels", "opensora").items() for fault in faults(path, text)]


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("opensora_kernels/checks.py", "from opensora.config import STDiT3Config"),
        ("opensora_kernels/checks.py", "from .ops.modulate import modulate"),
        ("opensora_kernels/checks.py", "import os; os.environ['HOME']"),
        ("opensora_kernels/ops/modulate/__init__.py", "from opensora_kernels.ops.rms_norm import reference"),
        ("opensora_kernels/ops/modulate/__init__.py", "from ..rms_norm.reference import rms_norm"),
        ("opensora_kernels/ops/modulate/__init__.py", "from opensora_kernels import rms_norm"),
        ("opensora_kernels/ops/modulate/__init__.py", "from opensora_kernels.sequence_parallel import gather_sequence"),
        ("opensora_kernels/checks.py", "from opensora_kernels.sequence_parallel import gather_sequence"),
        ("opensora_kernels/sequence_parallel/attention.py", "from opensora_kernels.ops.attention import reference"),
        ("opensora_kernels/sequence_parallel/attention.py", "from opensora_kernels import attention"),
        ("opensora_kernels/vae/running.py", "from opensora_kernels.sequence_parallel import gather_sequence"),
        ("opensora_kernels/vae/operators.py", "from opensora_kernels.ops.causal_conv3d import reference"),
        ("opensora_kernels/vae/operators.py", "from opensora.vae import VideoVAE"),
        ("opensora_kernels/registration.py", "from opensora_kernels.vae import decode"),
        ("opensora_kernels/checks.py", "from opensora_kernels.integrations import apply_opensora_kernels"),
        ("opensora_kernels/integrations/blocks.py", "from opensora_kernels.ops.rms_norm import reference"),
        ("opensora_kernels/ops/modulate/reference.py", "from opensora_kernels.checks import check_float"),
        ("opensora_kernels/ops/modulate/reference.py", "from opensora_kernels.ops.rms_norm import rms_norm"),
        ("opensora_kernels/ops/modulate/reference.py", "import einops"),
        ("opensora_kernels/ops/modulate/reference.py", "import torch; wide = torch.float64"),
        ("opensora/data/reading.py", "from opensora.vae import VideoVAE"),
        ("opensora/data/reading.py", "from opensora.video import write_mp4"),
        ("opensora/models/layers.py", "def forward():\n    from opensora.text.t5 import TextEncoder"),
        ("opensora/models/layers.py", "from opensora_kernels.ops.attention import attention"),
        ("opensora/models/layers.py", "from opensora_kernels import registration"),
        ("opensora/schedulers/rectified_flow.py", "from opensora import models"),
        ("opensora/training/loop.py", "from ..vae import VideoVAE"),
        ("opensora/sampler.py", "from opensora.trainer import run_train"),
        ("opensora/trainer.py", "from opensora.cli import main"),
        ("opensora/trainer.py", "import sys; sys.argv"),
        ("opensora/trainer.py", "import argparse"),
        ("opensora/new_room/file.py", "from opensora.config import STDiT3Config"),
    ],
)
def test_an_edge_against_the_rules_is_found(path: str, line: str):
    assert faults(path, line)


def test_data_flows_one_way():
    list(TopologicalSorter(ROOMS).static_order())  # raises CycleError


def test_every_room_in_the_list_exists():
    assert not [room for room in ROOMS if not any((ROOT / "opensora").glob(f"{room}*"))]


def test_operator_folders_have_the_same_parts():
    for folder in sorted((ROOT / "opensora_kernels/ops").iterdir()):
        if folder.is_dir() and folder.name != "__pycache__":
            files = {path.name for path in folder.glob("*.py")}
            assert files >= OP_PARTS, f"{folder.name} lacks {sorted(OP_PARTS - files)}"
            unknown = files - OP_PARTS - OTHER_OP_PARTS
            unknown = {file for file in unknown if not file.startswith(("cpu_", "cuda_", "triton_"))}
            assert not unknown, f"{folder.name}: {sorted(unknown)}"
            assert folder.name in opensora_kernels.__all__


def test_no_file_is_long():
    files = sources("opensora_kernels", "opensora", "bench", "tests")
    assert not {path: text.count("\n") for path, text in files.items() if text.count("\n") > MAX_LINES}
