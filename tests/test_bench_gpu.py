"""The command for a machine with a GPU: it refuses where there is none, and its parts stand alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import convolution, gpu, measure, model, operators, tune
from bench.__main__ import main
from bench.about import write_json
from bench.peers import peers_of
from bench.peers.registry import MOST_LETTERS
from opensora_kernels import backends, cases
from opensora_kernels.cases import Maker


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_refuses_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["gpu", "--output", str(tmp_path / "out")]) == 2
    assert "there is no CUDA device here" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def run_all(
    wanted: list[gpu.Part], folder: Path, seconds: float = 60, environment: dict[str, str] | None = None
) -> list[gpu.Outcome]:
    outcomes: list[gpu.Outcome] = []
    gpu.run_all(wanted, folder, time.monotonic() + seconds, environment or dict(os.environ), outcomes.append)
    return outcomes


def test_a_part_that_fails_hangs_or_is_missing_stops_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    hangs = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('begun', flush=True); time.sleep(60)"
    )
    wanted = [
        gpu.Part("fails", python("print('half'); raise SystemExit(3)"), 20),
        gpu.Part("hangs", python(hangs), 2),
        gpu.Part("missing", [str(tmp_path / "absent")], 20),
        gpu.Part("works", python("print('all')"), 20),
    ]
    outcomes = run_all(wanted, tmp_path)
    assert [outcome.status.split(":")[0] for outcome in outcomes] == ["failed", "stopped after 2 s", "failed", "done"]
    assert (tmp_path / "hangs.log").read_text() == "begun\n"
    assert "== works: done\nall" in capsys.readouterr().out


def test_parts_for_which_no_time_is_left_say_so(tmp_path: Path):
    (outcome,) = run_all([gpu.Part("late", python(""), 20)], tmp_path, seconds=1)
    assert outcome == gpu.Outcome("late", "not begun: no time left", 0.0)


def test_wheels_are_unpacked_to_where_python_finds_them(tmp_path: Path):
    site = gpu.unpack(wheel_of(tmp_path / "wheels", "some"), tmp_path / "site")
    wanted = [gpu.Part("imports", python("import some; print(some.VALUE)"), 20)]
    assert run_all(wanted, tmp_path, environment={"PYTHONPATH": str(site)})[0].status == "done"


def wheel_of(folder: Path, module: str) -> Path:
    folder.mkdir()
    with zipfile.ZipFile(folder / f"{module}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{module}.py", "VALUE = 1")
    return folder


def test_all_parts_fit_into_nine_minutes_the_most_wanted_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "which", lambda name, **places: f"/bin/{name}")
    wanted = gpu.parts(tmp_path)
    assert sum(part.most_seconds for part in wanted) <= 520
    names = ["build", "doctor", "convolution", "bench", "operators", "backward", "tests", "model", "tune"]
    assert [part.name for part in wanted] == [*names, "memcheck", "racecheck"]
    for part in wanted:
        assert "--plot" not in part.command


def test_the_commands_of_all_parts_are_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    readers = {"all": operators.read_options, "model": model.read_options, "tune": tune.read_options}
    read = set()
    for part in gpu.parts(tmp_path):
        if part.command[1:3] == ["-m", "bench"] and part.command[3] in readers:
            name, *rest = part.command[3:]
            options = readers[name]([name, *rest] if name == "all" else rest)
            assert options.seconds_in_all < part.most_seconds
            read.add(part.name)
    assert read == {"bench", "backward", "model", "tune"}


def test_the_sanitizer_sees_every_compiled_operator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "which", lambda name, **places: f"/bin/{name}")
    part = next(part for part in gpu.parts(tmp_path) if part.name == "memcheck")
    pytest_command = part.command[part.command.index(sys.executable) :]
    collect = [*pytest_command, "--collect-only", "-q", "-o", "addopts="]
    listed = subprocess.run(collect, cwd=gpu.ROOT, check=True, capture_output=True, text=True).stdout
    for test in (
        "test_packed_keys_are_each_samples_own[cuda]",
        "test_compiled_kernels_are_as_accurate_as_pytorch[plain]",
        "[causal_conv3d-cuda-eights-torch.bfloat16-cuda]",
        "[pack_shards-cuda-small-torch.bfloat16-cuda]",
        "[unpack_shards-cuda-small-torch.bfloat16-cuda]",
    ):
        assert test in listed


def test_test_files_that_can_not_be_imported_keep_no_others_from_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As on a machine without pytest-timeout and without packages that models need."""
    for folder in ("ops", "csrc"):
        (tmp_path / "tests" / folder).mkdir(parents=True)
    shutil.copy(gpu.ROOT / "pyproject.toml", tmp_path)
    on_gpu = "import pytest\n@pytest.mark.gpu\n@pytest.mark.timeout(9)\ndef test_it(): pass\n"
    (tmp_path / "tests" / "ops" / "test_operator.py").write_text(on_gpu)
    (tmp_path / "tests" / "test_other.py").write_text(on_gpu)
    for folder in ("tests", "tests/ops"):
        (tmp_path / folder / f"test_absent_{folder[-3:]}.py").write_text("import absent_package")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    wanted = [part for part in gpu.parts(tmp_path) if part.name in ("operators", "tests")]
    run_all(wanted, tmp_path, environment=dict(os.environ) | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"})
    for part in wanted:
        last = (tmp_path / f"{part.name}.log").read_text().splitlines()[-1]
        assert "1 passed" in last
        assert "1 error" in last


def test_folders_may_be_relative_and_every_finished_part_is_on_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restored_signals: None
):
    wheel_of(tmp_path / "wheels", "carried")
    ends = "; assert [part['name'] for part in json.load(open('out/run.json'))['parts']] == ['first']"
    steps = [f"import os, json, carried; os.chdir({str(tmp_path)!r})", "open('out/bench.json', 'w')"]
    drawn = gpu.Part("pictures", python(f"open({str(tmp_path / 'out' / 'bench.png')!r}, 'w')"), 20)
    wanted = [gpu.Part("first", python("; ".join(steps)), 20), gpu.Part("second", python(steps[0] + ends), 20)]
    monkeypatch.setattr(gpu, "parts", lambda output, **options: wanted)
    monkeypatch.setattr(gpu, "pictures", lambda output: [drawn] if (output / "bench.json").exists() else [])
    monkeypatch.setattr(gpu, "about_this_run", lambda device: {"device": "none"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.chdir(tmp_path)
    assert main(["gpu", "--output", "out", "--wheels", "wheels"]) == 0
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert [(part["name"], part["status"]) for part in record["parts"]] == [
        (name, "done") for name in ("first", "second", "pictures")
    ]
    assert (tmp_path / "out" / "bench.png").exists()
    assert not (tmp_path / "out" / "site").exists()


@pytest.fixture
def restored_signals() -> Any:
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def test_pictures_are_drawn_of_the_figures_that_are_there(tmp_path: Path):
    assert gpu.pictures(tmp_path) == []
    write_json(tmp_path / "model.json", {})
    (part,) = gpu.pictures(tmp_path)
    assert part.command[-2:] == [str(tmp_path / "model.json"), str(tmp_path)]


def test_wheels_must_lie_in_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        gpu.main(["--output", str(tmp_path), "--wheels", str(tmp_path / "absent")])
    assert "--wheels must be a folder, got" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_when_it_is_stopped_nothing_runs_on_and_what_is_finished_is_kept(number: int, tmp_path: Path):
    """The part ignores Ctrl-C and has a child of its own."""
    ignores = "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    child = f"{ignores} open({str(tmp_path / 'begun')!r}, 'w').write('.'); time.sleep(300)"
    part = f"{ignores} child = subprocess.Popen([sys.executable, '-c', {child!r}]); "
    part += f"open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid)); time.sleep(300)"
    command = f"""
import sys, torch
from bench import gpu
gpu.PATIENCE, torch.cuda.is_available, gpu.about_this_run = 0.2, lambda: True, lambda device: {{}}
wanted = [gpu.Part("quick", [sys.executable, "-c", ""], 20), gpu.Part("endless", [sys.executable, "-c", {part!r}], 300)]
gpu.parts = lambda output, **options: [*wanted, gpu.Part("never", ["absent"], 20)]
sys.exit(gpu.main(["--output", {str(tmp_path / "out")!r}]))
"""
    running = subprocess.Popen(python(command), cwd=gpu.ROOT, stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: (tmp_path / "begun").exists() and (tmp_path / "child").exists())
        os.kill(running.pid, number)
        assert running.wait(30) == 130
    finally:
        running.kill()
    child = int((tmp_path / "child").read_text())
    try:
        wait_for(lambda: not is_running(child), seconds=10)
    finally:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    outcomes = json.loads((tmp_path / "out" / "run.json").read_text())["parts"]
    assert [(one["name"], one["status"]) for one in outcomes] == [("quick", "done"), ("endless", "interrupted")]


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")  # one that ended and that nobody has waited for is listed all the same
    return not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.fixture
def small_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "LAYERS", {8: (3, 16, 16), 16: (3, 8, 8)})
    monkeypatch.setattr(measure, "SECONDS", 0.0)
    for name, size in {"FLUSHED_BYTES": 1 << 16, "COPIED_BYTES": 1 << 20, "MATRIX_SIDE": 64}.items():
        monkeypatch.setattr(measure, name, {"cpu": size, "cuda": size})
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)


def test_the_library_s_convolution_is_timed_both_ways(tmp_path: Path, small_layers: None):
    assert main(["convolution", "--json", str(tmp_path / "out.json")]) == 0
    row, _ = json.loads((tmp_path / "out.json").read_text())["rows"]
    frames, height, width = row["clip"]
    assert row["flops"] == 2 * 27 * 8 * 8 * frames * height * width
    assert row["forward"] > 0
    assert row["backward"] > 0


def test_convolutions_that_are_timed_stay_on_record(
    tmp_path: Path, small_layers: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    path, begun = tmp_path / "out.json", []

    def measured(channels: int, *others: Any) -> dict[str, Any]:
        begun.append(channels)
        if channels == 8:
            raise RuntimeError("no algorithm")
        assert [row["failed"] for row in json.loads(path.read_text())["rows"]] == ["RuntimeError: no algorithm"]
        raise KeyboardInterrupt

    monkeypatch.setattr(convolution, "measure", measured)
    assert main(["convolution", "--json", str(path)]) == 130
    assert begun == [8, 16]
    assert "no algorithm" in capsys.readouterr().out


def test_on_a_gpu_the_library_searches_for_its_fastest_convolution(small_layers: None, monkeypatch: pytest.MonkeyPatch):
    searched = []

    def measured(channels: int, clip: tuple[int, ...], dtype: torch.dtype, device: str) -> dict[str, Any]:
        searched.append((device, torch.backends.cudnn.benchmark))
        return {"channels": channels, "forward": 1.0, "backward": 1.0, "flops": 1}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(convolution, "about_this_run", lambda device: {})
    monkeypatch.setattr(convolution, "measure_ceilings", lambda *others: measure.Ceilings(1.0, 1.0))
    monkeypatch.setattr(convolution, "measure", measured)
    assert main(["convolution"]) == 0
    assert searched == [("cuda", True)] * 2


def test_large_draws_repeat_a_block_and_small_ones_do_not(monkeypatch: pytest.MonkeyPatch):
    small = Maker().normal(64)
    monkeypatch.setattr(cases, "DRAWN_ANEW", 67)
    assert torch.equal(Maker().normal(64), small)
    drawn = Maker().normal(12, 32, mean=1.0, std=2.0)
    assert drawn.is_contiguous()
    assert drawn.untyped_storage().nbytes() == drawn.numel() * 4
    block = Maker().normal(67, mean=1.0, std=2.0)
    assert torch.equal(drawn.view(-1), block.repeat(6)[: drawn.numel()])
    assert len(drawn.unique(dim=0)) == 12
    assert torch.equal(Maker(torch.float64).normal(12, 32, mean=1.0, std=2.0), drawn.double())
    assert torch.equal(Maker().normal(67), Maker().normal(1, 67)[0])


def test_of_a_large_tensor_a_million_numbers_are_drawn(monkeypatch: pytest.MonkeyPatch):
    drawn, randn = [], torch.randn

    def counted(shape: tuple[int, ...], **options: Any) -> torch.Tensor:
        drawn.append(torch.Size(shape).numel())
        return randn(shape, **options)

    monkeypatch.setattr(torch, "randn", counted)
    assert Maker(torch.bfloat16).normal(1 << 23).numel() == 1 << 23
    assert drawn == [cases.DRAWN_ANEW]


def test_rivals_have_short_names_that_say_alone_what_they_are():
    for op in backends.ops():
        names = [one.name for one in peers_of(op)]
        assert len(set(names)) == len(names)
        for name in names:
            assert len(name) <= MOST_LETTERS, name
            assert not name.startswith("the same"), name


def attention_in(dtype: torch.dtype) -> dict[str, Any]:
    draw = Maker(dtype)
    return {name: draw.normal(2, 4, 2, 8) for name in "qkv"}


def test_the_forward_only_wheel_of_flash_attention_is_a_rival_of_its_own(monkeypatch: pytest.MonkeyPatch):
    called: list[float | None] = []

    def flash_attn_func(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax_scale: float | None = None) -> Any:
        called.append(softmax_scale)
        return v

    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", SimpleNamespace(flash_attn_func=flash_attn_func))
    (rival,) = peers_of("attention", ["fa3-fwd"])
    arguments = attention_in(torch.bfloat16)
    assert torch.equal(rival.bind(arguments | {"scale": 0.5})(), arguments["v"])
    assert called == [0.5]
    assert rival.computes_not(arguments) is None
    assert "it takes bf16" in str(rival.computes_not(attention_in(torch.float16)))
    assert not rival.has_gradient


def test_cudnn_runs_on_the_stream_that_is_current_at_each_call(monkeypatch: pytest.MonkeyPatch):
    seen: list[Any] = []
    graph = SimpleNamespace(
        tensor_like=lambda tensor: _Node(),
        rmsnorm=lambda **options: (_Node(), None),
        build=lambda modes: None,
        get_workspace_size=lambda: 8,
        execute=lambda pack, workspace, handle: seen.append(("execute", handle)),
    )

    def pygraph(*, handle: str, **options: Any) -> Any:
        assert handle == "handle"
        return graph

    cudnn = SimpleNamespace(
        pygraph=pygraph,
        create_handle=lambda: "handle",
        set_stream=lambda handle, stream: seen.append((handle, stream)),
        data_type=SimpleNamespace(FLOAT=0),
        norm_forward_phase=SimpleNamespace(INFERENCE=0),
        heur_mode=SimpleNamespace(A=0, FALLBACK=1),
    )
    streams = iter([5, 7])
    monkeypatch.setitem(sys.modules, "cudnn", cudnn)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=next(streams)))
    (rival,) = peers_of("rms_norm", ["cudnn"])
    run = rival.bind({"x": torch.ones(2, 8), "weight": torch.ones(8)})
    run()
    run()
    assert seen == [("handle", 5), ("execute", "handle"), ("handle", 7), ("execute", "handle")]


class _Node:
    """Of a graph: a key of what it is executed with."""

    def set_output(self, is_output: bool) -> None:
        pass
