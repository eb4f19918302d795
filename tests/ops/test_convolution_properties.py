"""Random convolutions of small clips in Triton, interpreted, against the reference; and their laws."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

from opensora_kernels import Norm, backends, causal_conv3d, explain, use
from opensora_kernels.cases import Case
from opensora_kernels.ops.causal_conv3d import triton_forms
from tests.ops.accuracy import assert_accurate
from tests.ops.contract import cases_of, draw, gradients, public
from tests.ops.properties import Numbers, interpreted

SMALL_CASES = [case for case in cases_of("causal_conv3d") if not case.is_large]
PADDINGS = {
    "time_padding": st.sampled_from(["zeros", "replicate", "none"]),
    "space_padding": st.sampled_from(["zeros", "replicate", "reflect"]),
    "time_pad": st.sampled_from([None, None, 0, 1, 3]),
    "space_pad": st.none() | st.tuples(*[st.integers(0, 2)] * 4),
}


def small(configuration: Any) -> Any:
    """Blocks of 16, so that a clip of a few pixels takes several programs."""

    def configured(op: str, key: str, default: dict[str, int], device: torch.device) -> dict[str, int]:
        chosen = configuration(op, key, default, device)
        return {name: min(value, 16) if name.startswith("BLOCK") else value for name, value in chosen.items()}

    return configured


@contextmanager
def small_blocks(op: str) -> Iterator[None]:
    from opensora_kernels import tuning
    from opensora_kernels._triton import convolution, convolution_gradients
    from opensora_kernels.ops.causal_conv3d import triton_prepare, triton_prepare_backward, triton_statistics
    from opensora_kernels.ops.upsample_conv3d import triton_time

    users = [convolution, convolution_gradients, triton_statistics, triton_prepare, triton_time]
    with ExitStack() as stack:
        for user in (*users, triton_prepare_backward):
            stack.enter_context(mock.patch.object(user, "configuration", small(tuning.configuration)))
        stack.enter_context(use(**{op: "triton"}))
        yield


def assert_triton_agrees(op: str, arguments: dict[str, Any], dtype: torch.dtype) -> None:
    """Results in `dtype`, and in fp32 gradients with respect to every tensor."""

    def as_dtype(dtype: torch.dtype) -> dict[str, Any]:
        return pytree.tree_map(lambda leaf: leaf.to(dtype) if isinstance(leaf, Tensor) else leaf, arguments)

    with use(**{op: "reference"}), torch.no_grad():
        truth, at_same_dtype = public(op)(**as_dtype(torch.float64)), public(op)(**as_dtype(dtype))
    with small_blocks(op), torch.no_grad():
        assert_accurate(public(op)(**as_dtype(dtype)), at_same_dtype, truth, op)
    if dtype is torch.float32:
        with use(**{op: "reference"}):
            truth, at_same_dtype = gradients(op, as_dtype(torch.float64)), gradients(op, arguments)
        with small_blocks(op):
            actual = gradients(op, arguments)
        assert not any(
            grad.any() for grad, true in zip(actual, truth, strict=True) if true is None and grad is not None
        )
        known = [grads for grads in zip(actual, at_same_dtype, truth, strict=True) if grads[2] is not None]
        assert_accurate(*zip(*known, strict=True), f"gradients of {op}")


def is_refused(op: str, arguments: dict[str, Any]) -> bool:
    try:
        backends.flat_arguments(op, **arguments)
    except ValueError:
        return True
    return False


@st.composite
def causal_calls(draw: st.DrawFn) -> tuple[dict[str, Any], torch.dtype]:
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16]))
    numbers = Numbers(draw(st.integers(0, 1000)), torch.float32)
    groups = draw(st.sampled_from([1, 1, 2]))
    channels, num_out = groups * draw(st.integers(1, 4)), groups * draw(st.integers(1, 9))
    size = draw(st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6)))
    kernel = draw(st.sampled_from([(1, 1, 1), (3, 1, 1), (1, 3, 3), (2, 2, 1), (3, 2, 2), (2, 1, 4)]))
    x = numbers(draw(st.integers(1, 2)), channels, *size)
    if draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last_3d)
    fan_in = channels // groups * kernel[0] * kernel[1] * kernel[2]
    arguments = {
        "x": x, "weight": numbers(num_out, channels // groups, *kernel) * fan_in**-0.5, "groups": groups,
        "stride": draw(st.sampled_from([1, 1, 2, (2, 1, 1), (1, 2, 3)])),
        "dilation": draw(st.sampled_from([1, 1, 2, (3, 1, 2)])),
        "activation": draw(st.sampled_from([None, "silu"])), "return_state": draw(st.booleans()),
        **{name: draw(values) for name, values in PADDINGS.items()},
    }  # fmt: skip
    if draw(st.booleans()):
        arguments["bias"] = numbers(num_out)
    if draw(st.booleans()):
        arguments["state"] = numbers(*x.shape[:2], draw(st.integers(0, 3)), *x.shape[3:])
    if draw(st.booleans()):
        affine = [numbers(channels) if draw(st.booleans()) else None for _ in range(2)]
        # eps of a tenth: over groups of one or two numbers the usual one makes gradients that cancel to nothing
        options: dict[str, Any] = {"num_groups": draw(st.sampled_from([1, groups])), "eps": 0.1}
        kind = draw(st.sampled_from(["group", "rms"]))
        if kind == "group":
            options["per_frame"] = draw(st.booleans())
            if draw(st.booleans()):
                mean_and_squares = numbers(*x.shape[:3], 2).abs()
                options["statistics"] = mean_and_squares * torch.tensor([1.0, 5.0])
        arguments["norm"] = Norm(kind, *affine, **options)
    assume(not is_refused("causal_conv3d", arguments))
    with use(causal_conv3d="reference"):
        out = causal_conv3d(**{**arguments, "return_state": False})
    if draw(st.booleans()):
        arguments["residual"] = numbers(*out.shape)
    # sums over an output in bf16 are as good as its roundings, which may differ
    arguments["return_statistics"] = dtype is torch.float32 and draw(st.booleans())
    return arguments, dtype


@interpreted
@given(causal_calls())
def test_causal_conv3d_is_as_accurate_as_pytorch(call: tuple[dict[str, Any], torch.dtype]):
    assert_triton_agrees("causal_conv3d", *call)


@interpreted
@given(
    st.integers(2, 5), st.integers(0, 4), st.sampled_from(["zeros", "replicate"]), st.sampled_from([1, 2, 3]),
    st.sampled_from([None, "rms"]),
)  # fmt: skip
def test_changing_a_frame_changes_no_earlier_one(frames: int, changed: int, padding: str, kernel_t: int, norm: Any):
    numbers = Numbers(frames, torch.float32)
    x, weight = numbers(1, 3, frames, 4, 5), numbers(2, 3, kernel_t, 1, 3)
    later = x.clone()
    later[:, :, changed:] = torch.nan
    norm = norm and Norm(norm)
    with small_blocks("causal_conv3d"):
        whole, partly = (causal_conv3d(clip, weight, norm=norm, time_padding=padding) for clip in (x, later))
    assert torch.equal(whole[:, :, :changed], partly[:, :, :changed])
    assert partly[:, :, changed:].isnan().any(1).all()


@interpreted
@given(
    st.lists(st.integers(1, 3), min_size=2, max_size=3), st.sampled_from(["zeros", "replicate"]),
    st.sampled_from([(1, 1), (2, 1), (3, 1), (2, 2)]), st.booleans(), st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_chunks_with_state_equal_the_whole_clip(
    lengths: list[int], padding: str, taps: tuple[int, int], has_norm: bool, dtype: torch.dtype
):
    numbers = Numbers(sum(lengths), dtype)
    x, weight = numbers(1, 3, sum(lengths), 3, 6), numbers(2, 3, taps[0], 2, 3)
    norm = Norm("rms", numbers(3)) if has_norm else None
    options = {"time_padding": padding, "dilation": (taps[1], 1, 1), "norm": norm, "return_state": True}
    with small_blocks("causal_conv3d"):
        whole, last = causal_conv3d(x, weight, **options)
        state, pieces = None, []
        for chunk in x.split(lengths, 2):
            piece, state = causal_conv3d(chunk, weight, state=state, **options)
            pieces.append(piece)
    assert torch.equal(torch.cat(pieces, 2), whole)
    assert torch.equal(state, last)


@interpreted
@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.name)
def test_the_form_with_the_library_is_as_accurate(case: Case):
    def run(backend: str, dtype: torch.dtype) -> list[Tensor | None]:
        with use(causal_conv3d=backend):
            arguments = draw(case, dtype)
            return [*pytree.tree_leaves(causal_conv3d(**arguments)), *gradients("causal_conv3d", arguments)]

    truth, at_same_dtype = run("reference", torch.float64), run("reference", torch.float32)
    with mock.patch.object(triton_forms, "configuration", return_value={"FORM": triton_forms.LIBRARY}):
        actual = run("triton", torch.float32)
    assert [leaf is None for leaf in actual] == [leaf is None for leaf in truth]
    known = [leaves for leaves in zip(actual, at_same_dtype, truth, strict=True) if leaves[2] is not None]
    assert_accurate(*zip(*known, strict=True), "causal_conv3d with the library")


@interpreted
def test_a_form_that_was_never_measured_is_not_chosen_and_says_so():
    arguments = draw(cases_of("causal_conv3d")[0], torch.float32)
    assert (
        "was never measured on cpu: PyTorch's own chain is the choice"
        in explain("causal_conv3d", **arguments)["triton"]
    )
    flat = backends.flat_arguments("causal_conv3d", **arguments)
    with mock.patch.object(triton_forms, "configuration", return_value={"FORM": triton_forms.CHAIN}):
        assert "PyTorch's own chain is measured faster" in triton_forms.why_slower(*flat)
        assert triton_forms.form_of(*flat) == triton_forms.GEMM  # for who asks for Triton
    with mock.patch.object(triton_forms, "configuration", return_value={"FORM": triton_forms.GEMM}):
        assert triton_forms.why_slower(*flat) is None


@st.composite
def upsampling_calls(draw: st.DrawFn) -> tuple[dict[str, Any], torch.dtype]:
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16]))
    numbers = Numbers(draw(st.integers(0, 1000)), torch.float32)
    channels, mode = draw(st.integers(1, 4)), draw(st.sampled_from(["nearest_space", "nearest_space", "linear_time"]))
    x = numbers(draw(st.integers(1, 2)), channels, *draw(st.tuples(st.integers(1, 3), *[st.integers(1, 4)] * 2)))
    if draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last_3d)
    mixes = draw(st.booleans())
    kernel = draw(st.sampled_from([(1, 1, 1), (1, 3, 3), (3, 3, 1), (2, 2, 4), (1, 4, 5)]))
    num_out = channels if mixes else draw(st.integers(1, 5))
    fan_in = channels * kernel[0] * kernel[1] * kernel[2]
    arguments = {"x": x, "weight": numbers(num_out, channels, *kernel) * fan_in**-0.5, "mode": mode}
    if draw(st.booleans()):
        arguments["bias"] = numbers(num_out)
    if mixes:
        arguments["mix_factor"] = numbers(1)
    arguments |= {name: draw(values) for name, values in PADDINGS.items()}
    assume(not is_refused("upsample_conv3d", arguments))
    return arguments, dtype


@interpreted
@given(upsampling_calls())
def test_upsample_conv3d_is_as_accurate_as_pytorch(call: tuple[dict[str, Any], torch.dtype]):
    assert_triton_agrees("upsample_conv3d", *call)
