"""The tuner, with kernels interpreted and a clock that prefers what the test says."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import tune
from opensora_kernels import backends, tuning
from opensora_kernels.cases import Case, Maker
from opensora_kernels.ops.causal_conv3d import triton_forms
from tests.ops.contract import cases_of
from tests.ops.properties import interpreted


def clock(seconds_of: Callable[[dict[str, int]], float]) -> tune.Clock:
    """Seconds by the constants that the last question of a call was answered with."""

    def timed(run: Callable[[], Any]) -> float:
        answers: list[dict[str, int]] = []
        current = tuning._on_question

        def listen(op: str, key: str, chosen: dict[str, int]) -> dict[str, int]:
            given = dict(current(op, key, chosen)) if current else {}
            answers.append({**chosen, **given})
            return given

        with tuning.answered(listen):
            run()
        return sum(map(seconds_of, answers))

    return tune.Clock(timed)


@interpreted
def test_the_fastest_constants_are_found_step_by_step():
    case = cases_of("rms_norm")[0]
    found = dict(tune.tune("rms_norm", case, torch.float32, "cpu", clock(lambda c: abs(c["BLOCK_R"] - 4) + 1)))
    assert found
    assert {constants["BLOCK_R"] for constants in found.values()} == {4}


@interpreted
def test_what_is_not_faster_by_more_than_noise_is_left_alone():
    case = cases_of("rms_norm")[0]
    assert not [*tune.tune("rms_norm", case, torch.float32, "cpu", clock(lambda c: 1 + c["num_warps"] / 1000))]


@interpreted
def test_a_wrong_result_is_never_fast(capsys: pytest.CaptureFixture[str]):
    call = tune.Call("rms_norm", cases_of("rms_norm")[0], torch.float32, "cpu", is_backward=False)
    (key,) = call.questions()
    slow = tune.Clock(lambda run: 1.0)
    assert tune.seconds_with(call, key, {"BLOCK_R": 3}, slow) == float("inf")  # tiles are powers of two
    assert "BLOCK_R" in capsys.readouterr().err


@interpreted
def test_every_form_of_a_convolution_is_tried():
    call = tune.Call("causal_conv3d", cases_of("causal_conv3d")[0], torch.float32, "cpu", is_backward=True)
    key = next(key for key in call.questions() if key.startswith("form "))
    seconds = iter([1.0, 0.5, 0.7])
    assert tune.fastest_form(call, key, {}, tune.Clock(lambda run: next(seconds))) == {"FORM": LIBRARY}
    assert next(seconds, None) is None


CHAIN, LIBRARY, GEMM = triton_forms.CHAIN, triton_forms.LIBRARY, triton_forms.GEMM


def test_gradients_of_pytorch_s_own_chain_are_held_to_the_rule_for_gradients(monkeypatch: pytest.MonkeyPatch):
    """The reference's rule, for results alone, would refuse what every other form is compared with."""
    judged: list[bool] = []

    def judge(*arguments: Any, is_reference: bool) -> None:
        judged.append(is_reference)

    monkeypatch.setattr(tune, "why_wrong", judge)
    for is_backward in (False, True):
        call = tune.Call("rms_norm", cases_of("rms_norm")[0], torch.float32, "cpu", is_backward=is_backward)
        assert tune.seconds_with(call, "form", {"FORM": CHAIN}, tune.Clock(lambda run: 1.0)) == 1.0
    assert judged == [True, False]


@pytest.mark.parametrize("form", [CHAIN, LIBRARY, GEMM])
@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        pytest.param({"today": 1.0, "others": 0.5}, "another", id="faster"),
        pytest.param({"today": 1.0, "others": 0.98}, "today", id="faster by noise alone"),
        pytest.param({"today": 1.0, "others": math.inf}, "today", id="the only one"),
        pytest.param({"today": math.inf, "others": 1.0}, "another", id="wrong today"),
        pytest.param({"today": math.inf, "others": math.inf}, None, id="none"),
    ],
)
def test_a_form_must_be_faster_than_today_s_by_more_than_noise(
    form: int, seconds: dict[str, float], expected: str | None, monkeypatch: pytest.MonkeyPatch
):
    def timed(call: Any, key: str, constants: tune.Constants, clock: tune.Clock) -> float:
        return seconds["today" if constants["FORM"] == form else "others"]

    monkeypatch.setattr(tune, "seconds_with", timed)
    best = tune.fastest_form(None, "form", {"FORM": form}, tune.Clock(lambda run: 0.0))
    names = {each: "today" if each == form else "another" for each in (CHAIN, LIBRARY, GEMM)}
    assert names.get(best.get("FORM")) == expected


def test_where_no_form_was_measured_today_s_is_pytorch_s_own_chain(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tune, "seconds_with", lambda call, key, constants, clock: 1.0 - constants["FORM"] / 100)
    assert tune.fastest_form(None, "form", {}, tune.Clock(lambda run: 0.0)) == {"FORM": CHAIN}


def tuning_of(seconds_of: tune.Timer, saved: dict[str, Any], **limits: float) -> tune.Tuning:
    def save(op: str, found: Mapping[str, tune.Constants]) -> None:
        saved.setdefault(op, {}).update(found)

    return tune.Tuning(torch.float32, "cpu", seconds_of, save, **limits)


def case_that_raises(error: BaseException) -> Case:
    def make(draw: Maker) -> dict[str, Any]:
        raise error

    return Case("raises", make)


@interpreted
def test_cases_that_triton_refuses_or_that_raise_stop_no_other(capsys: pytest.CaptureFixture[str]):
    saved: dict[str, Any] = {}
    tuned = tuning_of(clock(lambda c: abs(c["BLOCK_R"] - 4) + 1).seconds_of, saved)
    wide = Case("wide", lambda draw: {name: draw.normal(1, 200, 1, 8) for name in "qkv"})
    assert tuned.run("qk_norm_attention", [wide]) == 0
    cases = [case_that_raises(RuntimeError("no luck")), case_that_raises(torch.OutOfMemoryError("full"))]
    assert tuned.run("rms_norm", [*cases, cases_of("rms_norm")[0]]) == 1
    assert {op: {c["BLOCK_R"] for c in found.values()} for op, found in saved.items()} == {"rms_norm": {4}}
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("qk_norm_attention wide: skipped, ")
    assert printed[1] == "rms_norm raises: failed, RuntimeError: no luck"
    assert printed[2] == "rms_norm raises: skipped, out of memory"


@interpreted
@pytest.mark.parametrize("where", ["why_wrong", "seconds_of"])
def test_a_case_in_which_memory_runs_out_is_skipped(
    where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def full(*arguments: Any, **options: Any) -> float:
        raise torch.OutOfMemoryError("full")

    saved: dict[str, Any] = {}
    tuned = tuning_of(full if where == "seconds_of" else lambda run: 1.0, saved)
    if where == "why_wrong":
        monkeypatch.setattr(tune, "why_wrong", full)
    assert tuned.run("rms_norm", cases_of("rms_norm")[:1]) == 0
    assert "skipped, out of memory" in capsys.readouterr().out
    assert saved == {}


@interpreted
def test_a_case_starts_from_what_the_case_before_it_found():
    seen: list[dict[str, int]] = []

    def seconds(constants: dict[str, int]) -> float:
        seen.append(constants)
        return abs(constants["BLOCK_R"] - 4) + 1

    tuned = tuning_of(clock(seconds).seconds_of, {})
    case = cases_of("rms_norm")[0]
    tuned.run("rms_norm", [case])
    assert seen[0]["BLOCK_R"] != 4
    del seen[:]
    tuned.run("rms_norm", [case])
    assert seen[0]["BLOCK_R"] == 4


@interpreted
def test_when_the_time_is_over_nothing_more_is_tried(capsys: pytest.CaptureFixture[str]):
    timed: list[int] = []
    cases = cases_of("rms_norm")[:1] * 2
    tuned = tuning_of(clock(lambda c: float(timed.append(1) or 1)).seconds_of, {}, seconds_each=1e-9)
    assert tuned.run("rms_norm", cases) == 0
    assert not timed
    assert capsys.readouterr().out.count("not begun, no time left") == 2
    tuned.seconds_each, tuned.ends = math.inf, time.monotonic() + 3600

    def last(run: Callable[[], Any]) -> float:
        timed.append(1)
        tuned.ends = clocks[-1].ends = 0.0
        return 1.0

    clocks = [tune.Clock(last)]
    assert [*tune.tune("rms_norm", cases[0], torch.float32, "cpu", clocks[-1])] == []
    assert len(timed) == 1


def test_convolutions_and_what_has_a_goal_come_first():
    order = tune.important_first(backends.ops())
    assert order[: len(tune.FIRST)] == list(tune.FIRST)
    assert set(order) == {op for op in backends.ops() if "triton" in backends.backends_of(op)}


def test_tables_are_added_to(tmp_path: Path):
    tune.write("some-gpu", "rms_norm", {"forward": {"BLOCK_R": 4}}, tmp_path)
    path = tune.write("some-gpu", "rms_norm", {"forward": {"num_warps": 8}, "backward": {"BLOCK_R": 1}}, tmp_path)
    table = json.loads(path.read_text())
    assert table == {"rms_norm": {"forward": {"BLOCK_R": 4, "num_warps": 8}, "backward": {"BLOCK_R": 1}}}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        tune.main(["rms_norm"])
    assert "there is no CUDA device" in capsys.readouterr().err
