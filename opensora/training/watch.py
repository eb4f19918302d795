"""Which losses are bad, and what a run does about one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from opensora.config import RunConfig

Verdict = Literal["good", "skip", "roll_back"]
WATCHED = ("loss", "grad_norm", "adversary_loss", "adversary_grad_norm")
# The running mean is over about 1 / (1 - DECAY) good steps, and speaks after MIN_STEPS of them.
DECAY = 0.98
MIN_STEPS = 10


class LossWatch:
    """Judges the numbers of each step by `on_bad_loss`, `spike_factor` and `max_bad_steps`.

    It sees the same numbers on every rank, so that all decide alike.
    """

    def __init__(self, run: RunConfig) -> None:
        self._run = run
        self._mean = 0.0
        self._num_good = 0
        self._num_bad = 0
        self.reason = ""

    def judge(self, values: Mapping[str, float], step: int) -> Verdict:
        """What to do with the update of 1-based `step`; why, in `reason`. `values` holds those WATCHED that there are.

        Errors: FloatingPointError when the run must stop.
        """
        self.reason = self._fault(values)
        if not self.reason:
            weight = max(1 - DECAY, 1 / (self._num_good + 1))
            self._mean += weight * (values["loss"] - self._mean)
            self._num_good += 1
            if self._run.on_bad_loss == "skip":
                self._num_bad = 0
            return "good"
        self._num_bad += 1
        if self._run.on_bad_loss == "stop":
            raise FloatingPointError(f"training: {self.reason} at step {step}")
        if self._num_bad > self._run.max_bad_steps:
            raise FloatingPointError(
                f"training: {self.reason} at step {step}, which is bad step {self._num_bad} in a row, "
                f"and run.max_bad_steps is {self._run.max_bad_steps}"
            )
        return self._run.on_bad_loss

    def saved(self) -> None:
        """A checkpoint was reached: what made a run go back lies behind it."""
        if self._run.on_bad_loss == "roll_back":
            self._num_bad = 0

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self._mean, "num_good": self._num_good}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the running mean; the count of bad steps goes on."""
        self._mean, self._num_good = state["mean"], state["num_good"]

    def _fault(self, values: Mapping[str, float]) -> str:
        for name in WATCHED:
            if not math.isfinite(values.get(name, 0.0)):
                return f"{name} must be finite, got {values[name]}"
        limit = self._run.spike_factor * self._mean
        if self._run.spike_factor and self._num_good >= MIN_STEPS and values["loss"] > limit > 0:
            return (
                f"loss must not exceed {self._run.spike_factor} x its running mean {self._mean:.6g}, "
                f"got {values['loss']:.6g}"
            )
        return ""
