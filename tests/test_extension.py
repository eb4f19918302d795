"""The door to the compiled libraries: they load and run, or a sentence says why not; their kernels are backends."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from opensora_kernels import __main__ as doctor
from opensora_kernels import __version__, _extension, backends
from opensora_kernels._extension import why_not_loaded
from opensora_kernels.sequence_parallel import peers

needs_cpu_library = pytest.mark.skipif(
    why_not_loaded("cpu") is not None, reason=f"no compiled CPU library: {why_not_loaded('cpu')}"
)


@needs_cpu_library
def test_cpu_library_runs_its_operator():
    x = torch.arange(5, dtype=torch.float32)
    assert torch.equal(torch.ops.opensora_kernels.smoke(x), x + 1)
    with pytest.raises(RuntimeError, match="x must be float32"):
        torch.ops.opensora_kernels.smoke(x.double())


@pytest.mark.gpu
def test_cuda_library_runs_its_operator():
    reason = why_not_loaded("cuda")
    if reason is not None:
        pytest.skip(reason)
    x = torch.arange(5, dtype=torch.float32, device="cuda")
    assert torch.equal(torch.ops.opensora_kernels.smoke(x), x + 1)


@needs_cpu_library
def test_build_facts_are_read_from_the_file_of_a_library(tmp_path: Path):
    facts = _extension.build_facts("cpu")
    assert facts["version"] == __version__
    assert facts["torch ABI"] == "2.10"
    assert facts["compiler"].startswith(("GCC ", "Clang "))
    (tmp_path / "other.so").write_bytes(b"nothing")
    assert _extension.read_facts(tmp_path / "other.so") == {}


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for libraries, of which none was asked for yet."""
    monkeypatch.setattr(_extension, "_FOLDER", tmp_path)
    monkeypatch.setattr(_extension, "_reasons", {})
    return tmp_path


def test_each_reason_against_loading_is_a_sentence(compiled: Path, monkeypatch: pytest.MonkeyPatch):
    assert "the compiled cpu library was not built" in why_not_loaded("cpu")
    (compiled / "_cpu_library.so").write_bytes(b"no library")
    assert "was not built" in why_not_loaded("cpu"), "a library is looked for once"
    _extension._reasons.clear()
    assert "the compiled cpu library does not load: " in why_not_loaded("cpu")
    (compiled / "_cuda_library.so").write_bytes(cuda_facts("13.0.88"))
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "this torch is a CPU build" in why_not_loaded("cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    _extension._reasons.pop("cuda")
    assert "the compiled cpu library does not load" in why_not_loaded("cuda"), "it has the schemas"
    _extension._reasons.update(cpu=None)
    _extension._reasons.pop("cuda")
    monkeypatch.setattr(_extension, "_driver_version", lambda: (12, 4))
    assert why_not_loaded("cuda") == (
        "the compiled cuda library is of CUDA 13.0.88, and the driver knows CUDA 12.4 at most"
    )
    _extension._reasons.pop("cuda")
    monkeypatch.setattr(_extension, "_driver_version", lambda: (13, 0))
    assert "the compiled cuda library does not load: " in why_not_loaded("cuda")


def cuda_facts(nvcc: str) -> bytes:
    facts = f"version=0.0.1; torch ABI=0x020a000000000000; torch headers=2.13.0; compiler=GCC 12; nvcc={nvcc}"
    return b"\x7fELF " + _extension._FACTS + facts.encode() + b"; architectures=80-real 90\0 more"


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> str:
    """An operator with a reference and with kernels in both libraries, which take one axis."""
    plain = backends.Implementation(torch.clone, is_plain=True)
    monkeypatch.setitem(backends._implementations, "toy", {"reference": plain})
    for library in ("cpu", "cuda"):
        module = ModuleType(f"opensora_kernels.ops.toy.{_extension._MODULES[library]}")
        module.forward = lambda x, library=library: (library, x)
        module.backward = lambda grads, wanted, saved, x: grads
        monkeypatch.setitem(sys.modules, module.__name__, module)
        _extension.register("toy", library, why_not=takes_one_axis)
    monkeypatch.setattr(_extension, "_reasons", {"cpu": None, "cuda": "the compiled cuda library was not built"})
    return "toy"


def takes_one_axis(x: Tensor) -> str | None:
    return None if x.dim() == 1 else f"x has {x.dim()} axes"


def test_a_library_serves_tensors_on_its_device_alone(toy: str, monkeypatch: pytest.MonkeyPatch):
    x = torch.ones(2)
    assert backends.choose(toy, x) == "cpu"
    assert backends.implementation(toy, "cpu").forward(x) == ("cpu", x)
    assert backends.implementation(toy, "cpu").backward([x], [True], [], x) == [x]
    assert backends.choose(toy, x[None]) == "reference"
    assert backends.why_not(toy, "cpu", x[None]) == "x has 2 axes"
    assert backends.why_not(toy, "cuda", x) == "the compiled cuda library was not built"
    on_meta = x.to("meta")
    assert "needs a tensor on cpu, got one on meta" in backends.why_not(toy, "cpu", on_meta)
    monkeypatch.setitem(_extension._reasons, "cuda", None)
    assert "needs a tensor on cuda, got one on cpu" in backends.why_not(toy, "cuda", x)
    with backends.meta_as("cuda"):
        assert backends.choose(toy, on_meta) == "cuda"


def test_an_old_gpu_is_refused(toy: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_extension, "_reasons", {"cpu": None, "cuda": None})
    monkeypatch.setattr(_extension, "_capabilities", {0: (7, 5), 1: (9, 0)})
    monkeypatch.setattr(backends, "device_of", lambda values: torch.device("cuda", values[1]))
    reason = _extension._why_not_here("cuda", (None, 0))
    assert reason == "the compiled cuda library needs compute capability 8.0, cuda:0 has 7.5"
    assert _extension._why_not_here("cuda", (None, 1)) is None
    assert peers.why_not_here(torch.device("cuda", 0)) == reason


def test_compiled_code_takes_the_answer_without_tracing_the_loading(toy: str, monkeypatch: pytest.MonkeyPatch):
    def load(library: str) -> str:
        ctypes.CDLL(None)  # no trace goes through this
        return "not here"

    monkeypatch.setattr(_extension, "_reasons", {})
    monkeypatch.setattr(_extension, "_load", load)

    def function(x: Tensor) -> Tensor:
        return x + (1 if backends.why_not("toy", "cpu", x) == "not here" else 0)

    torch._dynamo.reset()
    assert torch.compile(function, fullgraph=True, backend="eager")(torch.zeros(1)) == 1


def test_doctor_says_what_a_library_was_built_with_though_it_does_not_load(compiled: Path):
    (compiled / "_cuda_library.so").write_bytes(cuda_facts("13.0.88"))
    parts = doctor._parts()
    place = [name for name, _ in parts].index("cuda library")
    assert parts[place + 1][1] == "version 0.0.1 by GCC 12 for torch >= 2.10, with headers of 2.13.0"
    assert parts[place + 2][1] == "and by nvcc 13.0.88 for 80-real 90"
    assert doctor.library_hazards("cuda") == [
        f"_cuda_library.so was built from version 0.0.1, this is {__version__}: install again"
    ]


@pytest.mark.parametrize(("library", "name"), [("cpu", "some.cpp"), ("cuda", "some.cuh")])
def test_doctor_finds_a_library_that_is_older_than_its_sources(
    library: str, name: str, compiled: Path, monkeypatch: pytest.MonkeyPatch
):
    (compiled / "csrc").mkdir()
    source = compiled / "csrc" / name
    source.touch()
    monkeypatch.setattr(doctor, "__file__", str(compiled / "opensora_kernels/__main__.py"))
    for each in ("cpu", "cuda"):
        path = compiled / f"_{each}_library.so"
        path.write_bytes(cuda_facts("13.0.88").replace(b"0.0.1", __version__.encode()))
        os.utime(path, (2, 2))
    os.utime(source, (1, 1))
    assert doctor.library_hazards(library) == []
    os.utime(source, (3, 3))
    assert doctor.library_hazards(library) == [f"_{library}_library.so is older than csrc/{name}: install again"]
    assert doctor.library_hazards("cuda" if library == "cpu" else "cpu") == []


@pytest.mark.parametrize(("release", "cudnn", "is_hazard"), [
    ((2, 8), 91002, False), ((2, 9), 91002, True), ((2, 10), 91400, True), ((2, 11), 91500, False),
    ((2, 11), 90701, False),
])  # fmt: skip
def test_doctor_names_versions_of_cudnn_that_torch_avoids(release: tuple[int, int], cudnn: int, is_hazard: bool):
    assert bool(doctor.cudnn_hazards(release, cudnn)) == is_hazard


def test_doctor_says_which_kernels_a_gpu_can_not_run():
    assert doctor.device_hazards((9, 0)) == []
    assert "the compiled CUDA kernels need 8.0" in doctor.device_hazards((7, 5))[0]
    assert "the portable ones serve" in doctor.device_hazards((8, 0))[0]
    assert "the portable ones serve" in doctor.device_hazards((10, 0))[0]
