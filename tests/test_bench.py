"""The bench measures accurate calls and refuses to time wrong ones. Its figures are not judged here."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import base, measure, operators, record, workload
from bench.__main__ import main
from bench.cases import chosen_cases
from bench.sizes import FAMILIES
from opensora_kernels import backends
from opensora_kernels.backends import Implementation
from opensora_kernels.ops.rms_norm import reference


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SECONDS", 0.0)
    monkeypatch.setattr(measure, "MIN_RUNS", 2)
    monkeypatch.setattr(measure, "FLUSHED_BYTES", {"cpu": 1 << 16, "cuda": 1 << 16})
    monkeypatch.setattr(measure, "COPIED_BYTES", {"cpu": 1 << 20, "cuda": 1 << 20})
    monkeypatch.setattr(measure, "MATRIX_SIDE", {"cpu": 64, "cuda": 64})


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Tensor]], None]:
    """Make a function the library's rms_norm."""

    def put(forward: Callable[..., Tensor]) -> None:
        table = backends._implementations["rms_norm"] | {"library": Implementation(forward, is_plain=True)}
        monkeypatch.setitem(backends._implementations, "rms_norm", table)

    return put


def bench(*arguments: str) -> int:
    return main([*arguments, "--device", "cpu", "--dtype", "fp32", "--no-compile"])


def rows_of(folder: Path, *arguments: str) -> list[dict]:
    path = folder / "out.json"
    bench(*arguments, "--json", str(path))
    return json.loads(path.read_text())["rows"]


def planted_row(folder: Path) -> dict:
    rows = rows_of(folder, "rms_norm", "--cases", "odd", "--backends", "library")
    (row,) = (row for row in rows if row["backend"] == "library")
    return row


def test_every_backend_and_peer_is_measured_beside_the_reference(tmp_path: Path, capsys):
    assert bench("attention", "--cases", "odd", "no_keys", "--json", str(tmp_path / "out.json")) == 0
    record = json.loads((tmp_path / "out.json").read_text())
    assert {"device", "torch", "commit", "date", "GB/s", "TFLOP/s"} <= set(record)
    of_kind = {kind: {row["backend"] for row in record["rows"] if row["kind"] == kind} for kind in ("backend", "peer")}
    assert of_kind["backend"] == set(backends.backends_of("attention"))
    assert of_kind["peer"] >= {"SDPA flash", "SDPA math", "flash-attn 3", "SageAttention"}
    measured = [row for row in record["rows"] if "median" in row]
    for row in measured:
        assert 0 < row["p20"] <= row["median"] <= row["p80"]
        assert row["num_runs"] >= measure.MIN_RUNS
        assert row["floor"] > 0
        assert row["times_as_fast_as"][row["backend"]] == 1
    assert {"SDPA flash", "SDPA math"} <= {row["backend"] for row in measured}
    printed = capsys.readouterr().out
    assert f"{measured[0]['median'] * 1e3:.4f}" in printed
    assert "spread: the same version timed twice differs by" in printed


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_every_family_of_sizes_is_measured_in_both_directions(direction: str, tmp_path: Path, monkeypatch):
    smaller = {op: workload.Case("x=1", chosen_cases(op, "sizes")[0].make) for op in FAMILIES}
    monkeypatch.setattr(operators, "chosen_cases", lambda op, *others: [smaller[op]])
    backends_too = ["--backends", "reference", "library", "--peers", "torch", "diffusers"]
    rows = rows_of(tmp_path, "all", "--direction", direction, *backends_too)
    assert {row["op"] for row in rows} == set(backends.ops())
    for row in rows:
        assert "failed" not in row, row
        if row["kind"] == "backend":  # how accurate each is, for many inputs, is for the contract to say
            assert sum(key in row for key in ("median", "skipped", "wrong")) == 1, row
    if direction == "forward":
        with_a_peer = {row["op"] for row in rows if row["kind"] == "peer" and "median" in row}
        assert set(backends.ops()) - with_a_peer == {"attention", "pack_shards", "unpack_shards"}


def test_a_wrong_result_is_named_and_not_timed(plant, capsys):
    plant(lambda x, weight, eps: torch.zeros_like(x))
    assert bench("rms_norm", "--cases", "odd", "--backends", "library") == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if " library " in line]
    assert "wrong: result[0]: max error" in line


def test_a_kernel_that_leaves_half_of_its_result_out_is_refused(plant, tmp_path: Path):
    def half(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty_like(x)
        out[: len(x) // 2 + 1] = reference.rms_norm(x[: len(x) // 2 + 1], weight, eps)
        return out

    plant(half)
    row = planted_row(tmp_path)
    assert "wrong" in row
    assert "median" not in row


def test_a_kernel_that_leaves_half_of_its_buffer_stale_is_refused(plant, tmp_path: Path):
    """Right at first: the first calls fill the buffer."""
    buffers: dict[int, Tensor] = {}

    def half_stale(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if x.data_ptr() not in buffers:
            buffers[x.data_ptr()] = reference.rms_norm(x, weight, eps)
        out = buffers[x.data_ptr()]
        out[:1] = reference.rms_norm(x[:1], weight, eps)
        return out

    plant(half_stale)
    row = planted_row(tmp_path)
    assert row["wrong"].startswith("right at first, but not for other values")
    assert "median" not in row


def test_a_kernel_that_returns_an_earlier_result_is_refused(plant, tmp_path: Path):
    """Right at first, and for every other input too, as long as each stays where it is."""
    earlier: dict[int, Tensor] = {}

    def stale(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if x.data_ptr() not in earlier:
            earlier[x.data_ptr()] = reference.rms_norm(x, weight, eps)
        return earlier[x.data_ptr()]

    plant(stale)
    row = planted_row(tmp_path)
    assert row["wrong"].startswith("right at first, but not for other values")


def test_a_kernel_that_changes_its_inputs_is_refused(plant, tmp_path: Path):
    def in_place(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = reference.rms_norm(x, weight, eps)
        x.mul_(2)  # of which rms_norm's result hardly depends
        return out

    plant(in_place)
    row = planted_row(tmp_path)
    assert row["wrong"] == "it changed its inputs"


def test_a_backend_that_raises_leaves_the_other_rows_alone(plant, tmp_path: Path):
    def fall(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        raise RuntimeError("no luck")

    plant(fall)
    rows = {row["backend"]: row for row in rows_of(tmp_path, "rms_norm", "--cases", "odd", "--backends", "library")}
    assert rows["library"]["failed"] == "RuntimeError: no luck"
    assert "median" in rows["reference"]
    assert bench("rms_norm", "--cases", "odd", "--backends", "library") == 1


def test_after_ctrl_c_finished_rows_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    started: list[str] = []

    def interrupted(contents: workload.Workload, contender: workload.Contender, *others: object) -> dict:
        started.append(contender.name)
        if len(started) == 3:
            raise KeyboardInterrupt
        return contents.measure(contender, *others[:1])

    monkeypatch.setattr(operators, "attempt", interrupted)
    path = tmp_path / "out.json"
    assert bench("rms_norm", "--cases", "small", "--json", str(path)) == 130
    rows = json.loads(path.read_text())["rows"]
    assert [row["backend"] for row in rows if "median" in row] == started[:2]
    assert "interrupted" in capsys.readouterr().out


def test_another_revision_is_measured_in_the_same_run(tmp_path: Path, capsys):
    if subprocess.run(["git", "rev-parse", "HEAD"], cwd=base.ROOT, capture_output=True).returncode:
        pytest.skip("this is no git repository")
    (row,) = rows_of(
        tmp_path, "rms_norm", "--cases", "odd", "--base", "HEAD", "--backends", "reference", "--peers", "none"
    )
    assert row["base"]["median"] > 0
    assert row["times_as_fast_as"]["base"] == row["base"]["median"] / row["median"]
    worktrees = subprocess.run(["git", "worktree", "list"], cwd=base.ROOT, capture_output=True, text=True).stdout
    assert "bench-base-" not in worktrees
    with pytest.raises(SystemExit):
        bench("rms_norm", "--base", "no-such-revision")
    assert "git knows no revision 'no-such-revision'" in capsys.readouterr().err


def test_pictures_are_drawn_of_every_operator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(FAMILIES, "rms_norm", replace(FAMILIES["rms_norm"], sizes=(2, 5)))
    options = ["--quick", "--direction", "both", "--backends", "reference"]
    assert bench("rms_norm", *options, "--plot", str(tmp_path)) == 0
    stems = ("rms_norm", "rms_norm_by_tokens", "roofline")
    expected = {f"{stem}.png" for stem in stems} | {"rms_norm_backward.png", "rms_norm_backward_by_tokens.png"}
    assert {path.name for path in tmp_path.iterdir()} == expected | {"roofline_backward.png"}


@pytest.mark.gpu
def test_what_is_launch_bound_is_replayed_as_a_graph(tmp_path: Path):
    path = tmp_path / "out.json"
    assert main(["rms_norm", "--device", "cuda", "--cases", "odd", "--quick", "--json", str(path)]) == 0
    measured = [row for row in json.loads(path.read_text())["rows"] if "median" in row]
    assert all(row["is_replayed"] and row["peak_bytes"] > 0 for row in measured)


def test_backends_may_be_named_with_commas_and_compile_is_no_backend(tmp_path: Path):
    for names in (["library,reference,compile"], ["library", "reference", "compile"]):
        rows = rows_of(tmp_path, "attention", "--cases", "odd", "--peers", "none", "--backends", *names)
        assert [row["backend"] for row in rows] == ["reference", "library"]


def test_unknown_cases_and_backends_are_refused(capsys):
    with pytest.raises(SystemExit):
        bench("rms_norm", "--cases", "odd", "absent")
    assert "names of cases of rms_norm, got 'absent'" in capsys.readouterr().err
    assert main(["rms"]) == 2
    assert "got 'rms'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench("rms_norm", "--backends", "fast")
    assert "BACKEND must be one of cuda, triton, npu, cpu, library, reference, compile, got 'fast'" in (
        capsys.readouterr().err
    )
    with pytest.raises(SystemExit):
        bench("rms_norm", "--peers", "best")
    assert "invalid choice: 'best'" in capsys.readouterr().err


@pytest.mark.parametrize("trick", ["first_copy_only", "by_version", "when_nobody_looks", "put_off"])
def test_a_kernel_that_is_right_only_while_it_is_watched_is_refused(trick: str, plant, tmp_path: Path):
    known: dict[object, Tensor] = {}

    class Later(Tensor):
        pass

    def forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if trick == "put_off":
            return reference.rms_norm(x, weight, eps).as_subclass(Later)
        if trick == "when_nobody_looks" and not torch.are_deterministic_algorithms_enabled():
            return torch.zeros_like(x)
        if trick == "by_version":
            key = (x.data_ptr(), x._version, weight.data_ptr(), weight._version)
            return known.setdefault(key, reference.rms_norm(x, weight, eps))
        first = known.setdefault("first", x)
        is_known = trick != "first_copy_only" or x.data_ptr() == first.data_ptr()
        return reference.rms_norm(x, weight, eps) if is_known else torch.zeros_like(x)

    plant(forward)
    row = planted_row(tmp_path)
    assert "median" not in row
    assert row["wrong"]


def test_a_peer_that_is_a_little_less_accurate_is_timed_and_marked(plant, tmp_path: Path, monkeypatch, capsys):
    wrongs = iter(["max error 6e-6, allowed 5e-6"])

    def strict_once(*arguments, leniency: float = 1.0, **options):
        return next(wrongs, None) if leniency == 1.0 else None

    case = chosen_cases("rms_norm", "odd")[0]
    found = workload.Workload("rms_norm", case, torch.float32, "cpu")
    peer = replace(workload.of_backend("rms_norm", "reference"), name="peer", kind="peer")
    monkeypatch.setattr(workload, "why_wrong", strict_once)
    row = found.measure(peer, measure.Ceilings(1e9, 1e9), seconds=0.0)
    assert row["median"] > 0
    assert "6e-6" in row["less_accurate"]


def test_what_cannot_be_drawn_loses_no_finished_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cases = [replace(case) for case in chosen_cases("rms_norm", ["small", "odd"])[:2]]

    def no_memory(draw):
        raise RuntimeError("too large")

    cases[0] = replace(cases[0], make=no_memory)
    monkeypatch.setattr(operators, "chosen_cases", lambda *arguments: cases)
    path = tmp_path / "new" / "out.json"
    assert bench("rms_norm", "--json", str(path)) == 1
    rows = json.loads(path.read_text())["rows"]
    assert rows[0]["failed"] == "RuntimeError: too large"
    assert any("median" in row and row["case"] == cases[1].name for row in rows)


def test_a_lost_device_ends_the_run_and_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    def lose(workload, contender, ceilings, seconds):
        if contender.name == "library":
            raise record.DeviceLost("the device is lost")
        return workload.measure(contender, ceilings, seconds=seconds)

    monkeypatch.setattr(operators, "attempt", lose)
    assert bench("attention", "--cases", "odd", "--json", str(tmp_path / "out.json")) == 1
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert "median" in rows[0]
    assert "the device is lost" in capsys.readouterr().out


def test_pictures_are_drawn_later_from_the_file(tmp_path: Path):
    bench("rms_norm", "--cases", "odd", "--json", str(tmp_path / "out.json"))
    assert main(["plot", str(tmp_path / "out.json"), str(tmp_path / "later")]) == 0
    assert (tmp_path / "later" / "rms_norm.png").exists()
