"""The tuner, with kernels interpreted and a clock that prefers what the test says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import tune
from opensora_kernels import tuning
from opensora_kernels.ops.causal_conv3d import triton_forms
from tests.ops.contract import cases_of
from tests.ops.properties import interpreted


def clock(seconds_of: Callable[[dict[str, int]], float]) -> tune.Timer:
    """Seconds by the constants that the last question of a call was answered with."""

    def time(run: Callable[[], Any]) -> float:
        answers: list[dict[str, int]] = []
        current = tuning._on_question

        def listen(op: str, key: str, chosen: dict[str, int]) -> dict[str, int]:
            given = dict(current(op, key, chosen)) if current else {}
            answers.append({**chosen, **given})
            return given

        with tuning.answered(listen):
            run()
        return sum(map(seconds_of, answers))

    return time


@interpreted
def test_the_fastest_constants_are_found_step_by_step():
    case = cases_of("rms_norm")[0]
    found = tune.tune("rms_norm", case, torch.float32, "cpu", clock(lambda c: abs(c["BLOCK_R"] - 4) + 1))
    assert found
    assert {constants["BLOCK_R"] for constants in found.values()} == {4}


@interpreted
def test_what_is_not_faster_by_more_than_noise_is_left_alone():
    case = cases_of("rms_norm")[0]
    assert tune.tune("rms_norm", case, torch.float32, "cpu", clock(lambda c: 1 + c["num_warps"] / 1000)) == {}


@interpreted
def test_a_wrong_result_is_never_fast(capsys: pytest.CaptureFixture[str]):
    call = tune.Call("rms_norm", cases_of("rms_norm")[0], torch.float32, "cpu", is_backward=False)
    (key,) = call.questions()
    assert tune.seconds_with(call, key, {"BLOCK_R": 3}, lambda run: 1.0) == float("inf")  # tiles are powers of two
    assert "BLOCK_R" in capsys.readouterr().err


@interpreted
@pytest.mark.parametrize("form", [triton_forms.CHAIN, triton_forms.LIBRARY, triton_forms.GEMM])
def test_the_form_of_a_convolution_is_the_fastest_of_three(form: int):
    call = tune.Call("causal_conv3d", cases_of("causal_conv3d")[0], torch.float32, "cpu", is_backward=True)
    key = next(key for key in call.questions() if key.startswith("form "))
    timed = []

    def time(run: Callable[[], Any]) -> float:
        timed.append(run())
        return 0.5 if len(timed) == 1 + form else 1.0

    assert tune.fastest_form(call, key, time) == {"FORM": form}
    assert len(timed) == 3


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
