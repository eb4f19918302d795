"""The training loop on a toy: exact resume, stops, failures, and the arithmetic of a step."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageWriter

from opensora.training.checkpoint import read_state, read_tensors
from opensora.training.records import read_losses
from tests.training.toy import OPTIMIZER, Hooks, constant, toy_model, train


def losses(output: Path) -> list[tuple[str, ...]]:
    """Rows of losses.csv as written, without what was measured by a clock."""
    return [tuple(value for name, value in row.items() if not name.endswith("seconds")) for row in read_losses(output)]


def raise_at(step: int, error: Exception) -> Hooks:
    def before_loss(count: int) -> None:
        if count == step:
            raise error

    return Hooks(before_loss=before_loss)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_broken_run_resumes_with_the_losses_of_an_unbroken_one(tmp_path: Path, dtype: str):
    whole = train(tmp_path / "whole", steps=12, dtype=dtype)
    with pytest.raises(RuntimeError, match="power cut"):
        train(tmp_path / "broken", steps=12, dtype=dtype, hooks=raise_at(7, RuntimeError("power cut")))
    resumed = train(tmp_path / "broken", steps=12, dtype=dtype, resume=True)
    assert losses(tmp_path / "whole") == losses(tmp_path / "broken")
    assert len(losses(tmp_path / "whole")) == 12
    assert resumed.loss == whole.loss
    expected, actual = (read_tensors(result.checkpoint) for result in (whole, resumed))
    assert expected.keys() == actual.keys()
    assert {name.split(".")[0] for name in expected} == {"weights", "ema", "exp_avg", "exp_avg_sq"}
    assert all(torch.equal(expected[key], actual[key]) for key in expected)


def test_a_run_that_was_killed_after_its_last_checkpoint_still_exports_its_model(tmp_path: Path):
    result = train(tmp_path, steps=4)
    shutil.rmtree(result.model)  # the kill came before it was written
    result = train(tmp_path, steps=4, resume=True)
    saved = read_tensors(result.checkpoint)["ema.toy.0.weight"]
    assert torch.equal(load_file(result.model / "toy.safetensors")["0.weight"], saved)


def test_samples_do_not_change_the_losses(tmp_path: Path):
    def sample(folder: Path, step: int) -> dict[str, float]:
        torch.rand(3)
        return {"drawn": float(torch.rand(()))}

    train(tmp_path / "without")
    train(tmp_path / "with", hooks=Hooks(sample=sample), sample_every=2)
    assert losses(tmp_path / "without") == losses(tmp_path / "with")


def test_a_loss_that_is_not_finite_stops_before_it_reaches_the_weights(tmp_path: Path):
    model = toy_model()

    def poison(count: int) -> None:
        if count == 4:
            with torch.no_grad():
                model[0].weight[0, 0] = float("nan")

    with pytest.raises(FloatingPointError, match=r"loss must be finite, got nan at step 5; .*step-00000004"):
        train(tmp_path, model=model, hooks=Hooks(before_loss=poison))
    path = tmp_path / "checkpoints" / "step-00000004"
    assert read_state(path)["step"] == 4
    assert all(torch.isfinite(tensor).all() for tensor in read_tensors(path).values())


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    train(tmp_path, steps=4)
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*.safetensors")}
    written = []

    def write_until_full(self: HuggingFaceStorageWriter, *plan: object) -> None:
        written.append(Path(self.path) / "half.safetensors")
        written[-1].write_bytes(b"half a checkpoint")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", write_until_full)
    with pytest.raises(OSError, match=r"No space left on device.*last good checkpoint: .*step-00000004"):
        train(tmp_path, steps=8, resume=True)
    monkeypatch.undo()
    assert written
    assert before == {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*.safetensors")}
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith(".")]
    assert train(tmp_path, steps=8, resume=True).step == 8


def test_a_signal_does_not_cut_off_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write = HuggingFaceStorageWriter.write_data

    def write_after_a_signal(self: HuggingFaceStorageWriter, *plan: object) -> object:
        time.sleep(0.3)  # until the loop has nothing left to do but to wait
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        return write(self, *plan)

    def end(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)  # as the command does outside of the loop

    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", write_after_a_signal)
    before = signal.signal(signal.SIGTERM, end)
    try:
        result = train(tmp_path, steps=2, checkpoint_every=0)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (result.step, result.checkpoint.name) == (2, "step-00000002")


def test_training_goes_on_while_a_checkpoint_of_its_moment_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    two_steps_later = threading.Event()
    write = HuggingFaceStorageWriter.write_data

    def write_late(self: HuggingFaceStorageWriter, *plan: object) -> object:
        assert two_steps_later.wait(60)
        return write(self, *plan)

    def at_batch(count: int) -> None:
        if count == 4:
            assert not list((tmp_path / "late" / "checkpoints").glob("step-*"))
            two_steps_later.set()

    options = {"steps": 5, "checkpoint_every": 3, "keep_checkpoints": 9}
    train(tmp_path / "prompt", **options)
    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", write_late)
    train(tmp_path / "late", **options, hooks=Hooks(before_loss=at_batch))
    prompt, late = (read_tensors(tmp_path / name / "checkpoints" / "step-00000003") for name in ("prompt", "late"))
    assert all(torch.equal(prompt[name], late[name]) for name in prompt)


def test_only_the_last_checkpoints_stay(tmp_path: Path):
    train(tmp_path, steps=9, keep_checkpoints=3, checkpoint_every=2)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000006", "step-00000008", "step-00000009"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_step_and_saves(tmp_path: Path, number: signal.Signals):
    before = signal.getsignal(number)

    def interrupt(count: int) -> None:
        if count == 2:
            signal.raise_signal(number)

    result = train(tmp_path / "broken", hooks=Hooks(before_loss=interrupt), checkpoint_every=100)
    assert (result.step, result.was_stopped, result.checkpoint.name) == (3, True, "step-00000003")
    assert signal.getsignal(number) == before
    train(tmp_path / "broken", resume=True)
    train(tmp_path / "whole")
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")


def test_a_second_interrupt_does_not_wait(tmp_path: Path):
    def interrupt_twice(count: int) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, hooks=Hooks(before_loss=interrupt_twice))


def test_an_output_with_checkpoints_is_not_overwritten(tmp_path: Path):
    train(tmp_path, steps=2)
    with pytest.raises(ValueError, match="output: must be a folder without checkpoints unless resuming"):
        train(tmp_path, steps=2)


def test_resuming_says_which_options_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    train(tmp_path, steps=2)
    train(tmp_path, steps=4, resume=True, optimizer=constant(lr=3e-3))
    told = capsys.readouterr().err
    assert "resuming after step 2" in told
    assert "changed since the checkpoint: optimizer.lr was 0.01, now 0.003" in told


def test_resuming_another_model_names_the_weight(tmp_path: Path):
    train(tmp_path, steps=2)
    with pytest.raises(ValueError, match=r"checkpoint: toy\.0\.weight must have shape \(8, 4\), got \(16, 4\)"):
        train(
            tmp_path,
            steps=4,
            resume=True,
            model=nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.SiLU(), nn.Linear(8, 1)),
        )


def test_accumulated_batches_equal_one_big_batch(tmp_path: Path):
    """Twice 8 of 16 samples against all 16 at once: the same mean gradient, so the same weights up to rounding."""

    def first_step(name: str, **changes: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        optimizer = constant(accumulation_steps=changes.pop("accumulation_steps"), grad_clip=0.0)
        hooks = Hooks(noise=0.0)
        model = nn.Linear(4, 1)
        result = train(
            tmp_path / name, steps=1, keys=(0,) * 16, optimizer=optimizer, model=model, hooks=hooks, **changes
        )
        return {name: t for name, t in read_tensors(result.checkpoint).items() if name.startswith("exp_avg")}

    big, small = (
        first_step("big", batch_size=16, accumulation_steps=1),
        first_step("small", batch_size=8, accumulation_steps=2),
    )
    for name, value in big.items():
        torch.testing.assert_close(small[name], value)


def test_the_average_follows_its_law(tmp_path: Path):
    seen: list[torch.Tensor] = []
    model = toy_model()
    hooks = Hooks(before_loss=lambda count: seen.append(model[0].weight.detach().clone()))
    result = train(tmp_path, steps=5, model=model, hooks=hooks, optimizer=constant(ema_decay=0.75))
    seen.append(model[0].weight.detach().clone())
    average = seen[0].double()
    for weight in seen[1:]:
        average = 0.75 * average + 0.25 * weight.double()
    saved = read_tensors(result.checkpoint)["ema.toy.0.weight"]
    torch.testing.assert_close(saved.double(), average)
    assert torch.equal(load_file(result.model / "toy.safetensors")["0.weight"], saved)


def test_bf16_training_keeps_updates_smaller_than_a_bf16_step(tmp_path: Path):
    model = toy_model()
    start = model[0].weight.detach().clone()
    result = train(tmp_path, steps=4, dtype="bf16", model=model, optimizer=constant(lr=1e-5))
    master = read_tensors(result.checkpoint)["weights.toy.0.weight"]
    assert model[0].weight.dtype == torch.bfloat16
    assert master.dtype == torch.float32
    assert not torch.equal(master, start)
    assert (master - start).abs().max() < 1e-4


def test_gradients_are_clipped_to_their_global_norm(tmp_path: Path):
    clipped = train(tmp_path / "clipped", steps=1, optimizer=constant(grad_clip=0.01, betas=(0.0, 0.999)))
    saved = read_tensors(clipped.checkpoint)
    norm = torch.cat([v.flatten() for k, v in saved.items() if k.startswith("exp_avg.")]).norm()
    assert norm == pytest.approx(0.01, rel=1e-3)
    assert float(read_losses(tmp_path / "clipped")[0]["grad_norm"]) > 0.01


def test_tensorboard_holds_the_losses(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, steps=3, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "run.steps must be at least 1, got 0"),
        ({"dtype": "fp16"}, "run.dtype must be fp32 or bf16"),
        ({"keep_checkpoints": 0}, "keep_checkpoints must be at least 1, got 0"),
        ({"optimizer": constant(OPTIMIZER, ema_decay=1.0)}, r"decay must lie in \[0, 1\), got 1.0"),
        ({"optimizer": constant(OPTIMIZER, accumulation_steps=0)}, "accumulation_steps must be at least 1, got 0"),
    ],
)
def test_impossible_options_are_refused(tmp_path: Path, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        train(tmp_path, **options)
