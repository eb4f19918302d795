"""What a run does about losses that are not finite, or that spike."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from opensora.training.checkpoint import read_tensors
from opensora.training.records import read_losses
from tests.training.toy import Hooks, constant, train

NAN = float("nan")


def scaled(**factors: float) -> Hooks:
    """Batch number b3=NAN: the fourth batch's loss is scaled by that."""
    return Hooks(noise=0.0, factor=lambda count: factors.get(f"b{count}", 1.0))


def recorded(output: Path) -> list[float]:
    return [float(row["loss"]) for row in read_losses(output)]


def test_a_skipped_step_leaves_weights_averages_and_moments_as_they_were(tmp_path: Path):
    options = {"optimizer": constant(), "on_bad_loss": "skip", "checkpoint_every": 1, "keep_checkpoints": 9}
    train(tmp_path, hooks=scaled(b3=NAN), **options)
    before, after, later = (read_tensors(tmp_path / "checkpoints" / f"step-0000000{step}") for step in (3, 4, 5))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not torch.equal(after["weights.toy.0.weight"], later["weights.toy.0.weight"])
    assert [math.isfinite(loss) for loss in recorded(tmp_path)] == [True, True, True, False, True, True]


def test_too_many_skipped_steps_in_a_row_stop_the_run(tmp_path: Path):
    hooks = scaled(b1=NAN, b2=NAN, b4=NAN, b5=NAN, b6=NAN)
    with pytest.raises(FloatingPointError, match=r"at step 7, which is bad step 3 in a row, and run.max_bad"):
        train(tmp_path, steps=9, hooks=hooks, on_bad_loss="skip", max_bad_steps=2)


def test_a_rolled_back_run_goes_on_with_the_batches_after_the_bad_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    seen: list[float] = []
    hooks = scaled(b5=NAN)
    hooks.see = lambda x: seen.append(float(x.sum()))
    result = train(tmp_path / "back", hooks=hooks, optimizer=constant(), on_bad_loss="roll_back", checkpoint_every=2)
    assert result.step == 6
    assert "step 6: loss must be finite, got nan; roll back" in capsys.readouterr().err
    assert len(recorded(tmp_path / "back")) == 6
    assert len(seen) == 8  # steps 5 and 6 again, on other batches
    assert len(set(seen)) == 8


def test_a_run_that_always_rolls_back_stops(tmp_path: Path):
    hooks = Hooks(factor=lambda count: NAN if count >= 3 else 1.0)
    with pytest.raises(FloatingPointError, match=r"max_bad_steps is 4; last good checkpoint: .*step-00000002"):
        train(tmp_path, hooks=hooks, on_bad_loss="roll_back", max_bad_steps=4)
    with pytest.raises(FloatingPointError, match=r"nothing to go back to"):
        train(tmp_path / "new", hooks=Hooks(factor=lambda count: NAN), on_bad_loss="roll_back")


def test_a_spike_is_a_loss_far_above_the_running_mean(tmp_path: Path):
    options = {"steps": 20, "optimizer": constant(lr=1e-5), "spike_factor": 1e3}
    train(tmp_path / "early", hooks=scaled(b2=1e6), **options)  # there is no mean yet to compare with
    with pytest.raises(FloatingPointError, match=r"loss must not exceed 1000.0 x its running mean .* at step 16"):
        train(tmp_path / "late", hooks=scaled(b15=1e6), **options)
    train(tmp_path / "off", hooks=scaled(b15=1e6), **(options | {"spike_factor": 0.0}))
    with pytest.raises(ValueError, match=r"spike_factor must be above 1, or 0 for no check, got 0.5"):
        train(tmp_path / "refused", spike_factor=0.5)
