"""The compiled CPU library's kernels over tokens and heads: what neither the CPU's kind nor threads may change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from opensora_kernels import attention, backends, gate_residual, modulate, qk_norm_rope, rms_norm, use
from opensora_kernels._extension import why_not_loaded
from opensora_kernels.cases import Maker
from tests.ops.accuracy import assert_accurate
from tests.ops.contract import cases_of, gradients, public

pytestmark = pytest.mark.skipif(why_not_loaded("cpu") is not None, reason=str(why_not_loaded("cpu")))
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
OPS = ("attention", "gate_residual", "modulate", "qk_norm_attention", "qk_norm_rope", "rms_norm")
CAPABILITIES = range(4)  # csrc/capability.h


@pytest.fixture
def limit() -> Iterator[Callable[[int], int]]:
    """Uses at most that capability of this CPU during a test, and returns what is in use."""
    yield torch.ops.opensora_kernels.cpu_capability
    torch.ops.opensora_kernels.cpu_capability(-1)


def of_cpu(op: str, **arguments: Any) -> tuple[list[Tensor], list[Tensor | None]]:
    """Results and gradients of the CPU backend."""
    with use(**{op: "cpu"}):
        return pytree.tree_leaves(public(op)(**arguments)), gradients(op, arguments)


def call(op: str, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
    """Enough tokens for several threads and blocks; 22 channels and 5 keys fill no vector."""
    draw = Maker(dtype, seed=seed)
    if op == "rms_norm":
        return {"x": draw.normal(1200, 110), "weight": draw.normal(110)}
    if op in ("modulate", "gate_residual"):
        call = {name: draw.normal(2, 600, 110) for name in ("x", "y")[: 1 + (op == "gate_residual")]}
        names = ("gate", "shift", "scale") if op == "gate_residual" else ("shift", "scale")
        tables = {f"{name}{other}": draw.normal(2, 110) for name in names for other in ("", "0")}
        return call | tables | {"frame_mask": draw.mask(2, 3)}
    q, k, v = (x.transpose(1, 2) for x in draw.normal(2, 5, 120, 3, 4, 22).unbind(3))
    weights = {"q_weight": draw.normal(22, mean=1.0, std=0.1), "k_weight": draw.normal(22, mean=1.0, std=0.1)}
    angles = {"cos": draw.normal(5, 11), "sin": draw.normal(5, 11)}
    if op == "attention":
        return {"q": q, "k": k, "v": v}
    return {"q": q, "k": k} | ({"v": v} if op == "qk_norm_attention" else {}) | weights | angles


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("op", OPS)
def test_every_capability_of_the_cpu_is_as_accurate_as_pytorch(op: str, capability: int, limit: Callable[[int], int]):
    if limit(capability) != capability:
        pytest.skip(f"this CPU's highest capability is {limit(-1)}")
    for case in cases_of(op):
        if case.is_large:
            continue
        for dtype in (torch.float32, torch.bfloat16):
            arguments = case.make(Maker(dtype))
            if backends.why_not(op, "cpu", *backends.flat_arguments(op, **arguments)) is not None:
                continue
            results, found = of_cpu(op, **arguments)
            with use(**{op: "reference"}):
                truth = case.make(Maker(torch.float64))
                at_same_dtype = public(op)(**arguments), gradients(op, arguments)
                true = public(op)(**truth), gradients(op, truth)
            assert_accurate(results, at_same_dtype[0], true[0], f"{op} of {case.name}")
            assert_accurate(found, at_same_dtype[1], true[1], f"gradients of {op} of {case.name}")


@DTYPES
@pytest.mark.parametrize("op", OPS)
def test_threads_do_not_change_a_bit(op: str, dtype: torch.dtype):
    arguments, num_threads = call(op, dtype), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = of_cpu(op, **arguments)
        torch.set_num_threads(3)
        together = of_cpu(op, **arguments)
    finally:
        torch.set_num_threads(num_threads)
    assert all(torch.equal(a, b) for a, b in zip(*map(pytree.tree_leaves, (alone, together)), strict=True))


@DTYPES
@pytest.mark.parametrize("op", ["attention", "qk_norm_attention", "qk_norm_rope"])
def test_views_of_a_packed_projection_have_the_bits_of_copies(op: str, dtype: torch.dtype):
    views = call(op, dtype)
    copies = {name: value.contiguous() for name, value in views.items()}
    in_place, apart = of_cpu(op, **views), of_cpu(op, **copies)
    assert all(torch.equal(a, b) for a, b in zip(*map(pytree.tree_leaves, (in_place, apart)), strict=True))


@DTYPES
@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_a_rotation_has_the_bits_of_the_reference(layout: str, dtype: torch.dtype):
    values = {name: value for name, value in call("qk_norm_rope", dtype).items() if "weight" not in name}
    for angles in (dtype, torch.float32):
        wanted = values | {name: values[name].to(angles) for name in ("cos", "sin")}
        with use(qk_norm_rope="reference"):
            want = qk_norm_rope(**wanted, rope_layout=layout)
        with use(qk_norm_rope="cpu"):
            have = qk_norm_rope(**wanted, rope_layout=layout)
        assert all(torch.equal(a, b) for a, b in zip(have, want, strict=True))


@DTYPES
def test_gates_and_tables_without_a_norm_have_the_bits_of_the_reference(dtype: torch.dtype):
    drawn = call("gate_residual", dtype)
    gated = {name: drawn[name] for name in ("x", "y", "gate", "gate0", "frame_mask")}
    shifted = {name: drawn[name] for name in ("x", "shift", "scale", "shift0", "scale0", "frame_mask")}
    for tables in (dtype, torch.float32):
        for op, values in ((gate_residual, gated), (modulate, shifted | {"normalize": False})):
            values = {name: _table_as(tables, value) for name, value in values.items()}
            with use(**{op.__name__: "reference"}):
                want = op(**values)
            with use(**{op.__name__: "cpu"}):
                assert torch.equal(op(**values), want)


def _table_as(dtype: torch.dtype, value: Any) -> Any:
    is_table = isinstance(value, Tensor) and value.dim() == 2 and value.is_floating_point()
    return value.to(dtype) if is_table else value


def test_a_head_attends_to_many_keys_in_parts_of_its_queries():
    draw = Maker()
    q, k, v = (draw.normal(2, size, 3, 20) for size in (70, 41, 41))
    lengths = torch.tensor([41, 17])
    with use(attention="reference"):
        truth = attention(q.double(), k.double(), v.double(), key_lengths=lengths)
        plain = attention(q, k, v, key_lengths=lengths)
    with use(attention="cpu"):
        assert_accurate(attention(q, k, v, key_lengths=lengths), plain, truth, "attention")


def test_long_and_tiny_calls_are_left_to_pytorch():
    q = torch.empty(1, 2049, 2, 8)
    assert "measured for up to 2048" in backends.explain("attention", q, q, q)["cpu"]
    assert "measured for up to 2048" in backends.explain("qk_norm_attention", q, q, q)["cpu"]
    assert backends.explain("attention", q, q[:, :2048], q[:, :2048])["cpu"] == "chosen"
    x = torch.empty(1, 512, 64)
    assert backends.explain("modulate", x, x[:, 0], x[:, 0])["cpu"] == "chosen"
    assert (
        "decides below 131072 elements with gradients"
        in backends.explain("modulate", x.requires_grad_(), x[:, 0], x[:, 0])["cpu"]
    )
    assert "float64" in backends.explain("rms_norm", x.double())["cpu"]


@pytest.mark.parametrize("op", ["modulate", "gate_residual"])
def test_masks_may_be_views(op: str):
    arguments = call(op, torch.float32)
    mask = arguments.pop("frame_mask")
    for view in (mask[:1].expand(2, 3), torch.cat([mask, mask], 1)[:, :3]):
        found = of_cpu(op, **arguments, frame_mask=view)
        expected = of_cpu(op, **arguments, frame_mask=view.contiguous())
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_gradient_of_an_expanded_token_is_found():
    shift, scale, token = torch.randn(1, 8), torch.randn(1, 8), torch.randn(8, 1, 1, requires_grad=True)
    found = []
    for backend in ("cpu", "reference"):
        with use(modulate=backend):
            out = modulate(token.permute(1, 2, 0).expand(1, 6, 8), shift, scale, normalize=False)
        found += torch.autograd.grad(out.square().sum(), token)
    torch.testing.assert_close(*found)


def test_a_sample_without_keys_gives_zeros_after_one_of_nan():
    q = torch.randn(2, 4, 1, 8)
    q[0] = torch.nan
    with use(attention="cpu"):
        out = attention(q, q, q, key_lengths=torch.tensor([4, 0]))
    assert out[0].isnan().all()
    assert (out[1] == 0).all()


@pytest.mark.parametrize("shape", [(3, 40, 2, 512), (1,) * 7 + (60, 512)], ids=str)
def test_rms_norm_leaves_what_it_would_copy_to_pytorch(shape: tuple[int, ...]):
    x = torch.randn(shape).transpose(1, 2)
    with use("reference"):
        expected = rms_norm(x)
    found = rms_norm(x)
    assert found.stride() == expected.stride()  # torch.compile counts on it
    torch.testing.assert_close(found, expected)
