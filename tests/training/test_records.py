"""What a run tells: losses.csv, log.txt, rates, boards, and the record of how it was started."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import opensora_kernels
from opensora.config import OptimizerConfig, RunConfig, TrainConfig
from opensora.training import ceiling, run_record
from opensora.training.ceiling import ceiling_flops
from opensora.training.records import Records, read_losses, write_run_record
from opensora.training.throughput import Throughput, show_rates


def records(folder: Path, **options: Any) -> Records:
    defaults = {"first_step": 0, "num_steps": 4, "log_every": 1, "tensorboard": False}
    return Records(folder, **(defaults | options))


def write(folder: Path, steps: range, **options: Any) -> None:
    with records(folder, first_step=steps.start - 1, **options) as run:
        for step in steps:
            run.step(step, {"loss": 1 / step, "seconds": 0.1})


def test_rows_after_the_step_that_a_run_resumes_from_are_dropped(tmp_path: Path):
    write(tmp_path, range(1, 5))
    unbroken = read_losses(tmp_path)
    write(tmp_path, range(3, 5))
    assert read_losses(tmp_path) == unbroken
    assert [row["step"] for row in unbroken] == ["1", "2", "3", "4"]
    assert [float(row["loss"]) for row in unbroken] == [1, 1 / 2, 1 / 3, 1 / 4]


def test_half_a_last_line_is_no_row(tmp_path: Path):
    write(tmp_path, range(1, 4))
    path = tmp_path / "losses.csv"
    path.write_bytes(path.read_bytes()[:-4])
    assert [row["step"] for row in read_losses(tmp_path)] == ["1", "2"]


def test_a_value_that_comes_later_adds_a_column(tmp_path: Path):
    with records(tmp_path) as run:
        run.step(1, {"loss": 1.0})
        run.step(2, {"loss": 2.0, "kl": 0.5})
        run.step(3, {"loss": 3.0})
    assert [row["kl"] for row in read_losses(tmp_path)] == ["", "0.5", ""]
    assert [row["loss"] for row in read_losses(tmp_path)] == ["1.0", "2.0", "3.0"]


def test_only_the_main_rank_writes_and_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "run"
    write(folder, range(1, 3), is_main=False, tensorboard=True, wandb_project="videos")
    with records(folder, is_main=False) as run:
        run.scalars(1, {"psnr": 30.0})
        run.note("hello")
        run.flush()
    assert not folder.exists()
    assert capsys.readouterr().err == ""


def test_rates_weigh_steps_by_the_time_they_took():
    speed = Throughput(ceiling_flops=lambda: 1e12)
    speed.add({"loss": 0.5, "seconds": 1.0, "data_seconds": 0.5, "num_samples": 2, "num_tokens": 100, "flops": 1e11})
    speed.add({"loss": 0.5, "seconds": 3.0, "data_seconds": 0.5, "num_samples": 2, "num_tokens": 700, "flops": 15e11})
    rates = speed.rates()
    assert rates == {
        "samples_per_second": 1.0,
        "tokens_per_second": 200.0,
        "flops_per_second": 4e11,
        "data_wait": 0.25,
        "mfu": 0.4,
    }
    assert show_rates(rates) == "1 samples/s, 200 tokens/s, 400 GFLOP/s, MFU 40.0 %, 25 % waiting for data"
    assert speed.rates() == {}


def test_what_no_step_reports_is_not_shown():
    speed = Throughput()
    speed.add({"seconds": 2.0, "num_samples": 1, "flops": 1e9})
    assert speed.rates() == {"samples_per_second": 0.5, "flops_per_second": 5e8}


def test_lines_say_speed_memory_and_time_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with records(tmp_path, log_every=2, ceiling_flops=lambda: 1e10) as run:
        for step in range(1, 5):
            run.step(step, {"loss": 0.25, "seconds": 0.5, "num_samples": 2, "flops": 1e9})
        run.scalars(4, {"psnr": 30.0})
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("step 2/4  loss 0.25  ")
    for text in (" s/step, ", " left, ", "4 samples/s", "2 GFLOP/s", "MFU 20.0 %", " GiB"):
        assert text in lines[0]
    assert lines[2] == "step 4/4  psnr 30"
    kept = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split("  ", 1)[1] for line in kept] == lines


def test_the_log_says_what_ended_a_run(tmp_path: Path):
    with pytest.raises(FloatingPointError), records(tmp_path):
        raise FloatingPointError("loss must be finite, got nan")
    assert "ended by FloatingPointError: loss must be finite, got nan" in (tmp_path / "log.txt").read_text()


def test_the_log_names_what_is_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    logger = logging.getLogger("opensora.data.loader.skipped")
    with records(tmp_path):
        logger.warning("skipped %s: %s", "a.mp4", "truncated")
    logger.warning("of another run")
    assert capsys.readouterr().err.splitlines()[0] == "skipped a.mp4: truncated"
    (line,) = (tmp_path / "log.txt").read_text().splitlines()
    assert line.endswith("  skipped a.mp4: truncated")


def test_a_terminal_gets_a_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    write(tmp_path, range(1, 5))
    assert "4/4" in capsys.readouterr().err
    assert "step 4/4" in (tmp_path / "log.txt").read_text()


def test_tensorboard_holds_losses_and_rates(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with records(tmp_path, tensorboard=True, ceiling_flops=lambda: 1e10) as run:
        run.step(1, {"loss": 0.5, "seconds": 0.5, "num_tokens": 50, "flops": 1e9})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Scalars("mfu")[0].value == pytest.approx(0.2)
    assert events.Scalars("tokens_per_second")[0].value == 100
    assert events.Scalars("peak_memory_gib")[0].value > 0


def test_an_absent_wandb_is_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # what the import system takes for absent
    write(tmp_path, range(1, 3), wandb_project="videos")
    assert "Weights & Biases: nothing is sent to 'videos'" in capsys.readouterr().err
    assert len(read_losses(tmp_path)) == 2


def test_wandb_gets_configuration_and_scalars_and_goes_on_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    starts: list[dict[str, Any]] = []
    logged: list[dict[str, float]] = []
    axes: list[dict[str, str]] = []
    finished: list[bool] = []

    def init(**options: Any) -> SimpleNamespace:
        starts.append(options)
        return SimpleNamespace(
            define_metric=lambda names, step_metric: axes.append({names: step_metric}),
            log=logged.append,
            finish=lambda: finished.append(True),
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for steps in (range(1, 3), range(2, 4)):  # the second from a checkpoint before the last step
        write(tmp_path, steps, wandb_project="videos", config=OptimizerConfig(lr=0.5))
    assert [start["project"] for start in starts] == ["videos"] * 2
    assert starts[0]["id"] == starts[1]["id"]
    assert starts[0]["config"]["lr"] == 0.5
    assert [values["step"] for values in logged] == [1, 2, 2, 3]
    assert axes == [{"*": "step"}] * 2
    assert logged[0]["loss"] == 1.0
    assert finished == [True] * 2


def test_a_run_folder_says_how_each_of_its_starts_was_made(tmp_path: Path):
    first = TrainConfig(run=RunConfig(output=str(tmp_path), steps=10))
    write_run_record(tmp_path, first, world_size=2, num_hosts=1)
    write_run_record(tmp_path, TrainConfig(run=RunConfig(output=str(tmp_path), steps=20)), first_step=10)
    assert json.loads((tmp_path / "config.json").read_text())["run"]["steps"] == 20
    starts = json.loads((tmp_path / "environment.json").read_text())
    assert [start["first_step"] for start in starts] == [0, 10]
    assert starts[0]["world_size"] == 2
    assert starts[0]["config_changes"] == []
    assert starts[1]["config_changes"] == ["run.steps was 10, now 20"]
    for start in starts:
        assert start["torch"] == torch.__version__
        assert start["opensora_kernels"] == opensora_kernels.__version__
        assert start["command"] == list(sys.orig_argv)
        assert start["date"].endswith("+00:00")


def test_a_record_names_no_host(tmp_path: Path):
    import socket

    write_run_record(tmp_path, {"lr": 1.0})
    entries = json.loads((tmp_path / "environment.json").read_text())[0]
    assert socket.gethostname() not in json.dumps(entries | {"command": []})


def test_the_commit_is_that_of_the_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    root = Path(run_record.__file__).parents[2]
    if (root / ".git").exists():
        assert run_record.source_commit() is not None
    monkeypatch.setattr(run_record, "__file__", str(tmp_path / "opensora" / "training" / "run_record.py"))
    assert run_record.source_commit() is None


def test_a_failed_write_keeps_the_record_of_earlier_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_run_record(tmp_path, {"lr": 1.0})
    before = (tmp_path / "environment.json").read_text()
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        write_run_record(tmp_path, {"lr": 2.0})
    assert (tmp_path / "environment.json").read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "environment.json"]


def test_the_ceiling_is_measured_once_and_draws_no_random_number(monkeypatch: pytest.MonkeyPatch):
    ceiling._measured.cache_clear()
    monkeypatch.setattr(ceiling, "_SIDE", {"cpu": 128})
    state = torch.get_rng_state()
    rate = ceiling_flops(torch.float32, "cpu", seconds=0.01)
    assert rate > 1e8
    assert ceiling_flops(torch.float32, torch.device("cpu"), seconds=0.01) == rate
    assert torch.equal(torch.get_rng_state(), state)
    ceiling._measured.cache_clear()
