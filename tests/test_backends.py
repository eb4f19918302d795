"""Which backend runs: the device's order, what was preferred, what was ordered, and what users are told."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor

from opensora_kernels import BackendError, attention, backends, explain, rms_norm, use
from opensora_kernels.backends import Implementation, choose
from opensora_kernels.registration import call, register_op

ROOT = Path(__file__).parents[1]
ON_CPU, ON_META = torch.ones(2), torch.ones(2, device="meta")


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> str:
    """An operator with four backends, of which `cpu` can serve only one-dimensional tensors."""

    def why_not(x: Tensor) -> str | None:
        return None if x.dim() == 1 else f"x has {x.dim()} axes"

    table = {
        "triton": Implementation(torch.clone, why_not=lambda x: "no GPU here"),
        "cpu": Implementation(torch.clone, why_not=why_not),
        "library": Implementation(torch.clone),
        "reference": Implementation(torch.clone, is_plain=True),
    }
    monkeypatch.setitem(backends._implementations, "toy", table)
    return "toy"


def test_the_first_backend_that_can_serves_in_the_order_of_the_device(toy: str):
    assert choose(toy, ON_CPU) == "cpu"
    assert choose(toy, ON_CPU[None]) == "library"
    assert choose(toy, ON_META) == "library"
    assert choose(toy, [ON_META, ON_CPU]) == "library"
    assert backends.order_of(toy, "cuda") == ["triton", "library", "reference"]
    assert backends.order_of(toy, "npu") == ["reference"]


def test_a_preferred_backend_serves_where_it_can(toy: str):
    with use("reference"):
        assert choose(toy, ON_CPU) == "reference"
    for cannot in ("triton", "cuda"):
        with use(cannot):
            assert choose(toy, ON_CPU) == "cpu"
    with use("cpu"):
        assert choose(toy, ON_CPU[None]) == "library"


def test_an_ordered_backend_serves_or_the_error_lists_every_candidate(toy: str):
    with use(toy="library"):
        assert choose(toy, ON_CPU) == "library"
    with use(toy="cpu"):
        assert choose(toy, ON_CPU) == "cpu"
        with pytest.raises(BackendError) as error:
            choose(toy, ON_CPU[None])
    assert str(error.value).splitlines() == [
        "toy: cpu was asked for and can't serve this call",
        "  cpu: x has 2 axes",
        "  triton: no GPU here",
        "  library: available",
        "  reference: available",
    ]
    with use(toy="cuda"), pytest.raises(BackendError, match="cuda: toy has no cuda implementation"):
        choose(toy, ON_CPU)


def test_an_order_reaches_the_public_function():
    with use(rms_norm="cuda"), pytest.raises(BackendError, match="reference: available"):
        rms_norm(ON_CPU)


def test_an_order_for_one_operator_outranks_a_preference(toy: str):
    with use("reference", toy="cpu"):
        assert choose(toy, ON_CPU) == "cpu"
        assert choose("rms_norm", ON_CPU) == "reference"


def test_leaving_restores_what_was_asked_before(toy: str):
    before = dict(backends._overrides)
    with use("reference"):
        with use(toy="library"):
            assert choose(toy, ON_CPU) == "library"
        with pytest.raises(BackendError), use(toy="cpu"):
            choose(toy, ON_CPU[None])
        assert choose(toy, ON_CPU) == "reference"
        use(toy="library")  # as a statement: until the block that it stands in ends
        assert choose(toy, ON_CPU) == "library"
    assert choose(toy, ON_CPU) == "cpu"
    assert backends._overrides == before


def test_unknown_names_are_refused_and_change_nothing():
    before = dict(backends._overrides)
    with pytest.raises(ValueError, match=r"there is no operator 'convolution'; the operators are attention, blend"):
        use(attention="library", convolution="cuda")
    with pytest.raises(ValueError, match=r"use: backend must be one of cuda, triton, .*, got 'fast'"):
        use("fast")
    with pytest.raises(ValueError, match="explain: there is no operator 'convolution'"):
        explain("convolution", ON_CPU)
    with pytest.raises(ValueError, match="register: backend must be one of"):
        backends.register("attention", "fast", Implementation(torch.clone))
    assert backends._overrides == before


def test_explain_takes_the_arguments_of_the_public_function():
    q = torch.ones(2, 2100, 4, 8)
    assert _told("attention", q, q, q) == {"library": "chosen", "reference": "available"}
    assert explain("attention", q, k=q, v=q, scale=1.0)["library"] == "chosen"
    empty = q[:0]
    assert _told("attention", empty, empty, empty) == {
        "library": "scaled_dot_product_attention has no gradient for empty tensors",
        "reference": "chosen",
    }
    with pytest.raises(ValueError, match="attention: "):
        explain("attention", q, q[:1, :, :2], q)


def test_explain_says_why_what_was_asked_for_is_not_there():
    q = torch.ones(2, 2100, 4, 8)
    with use(attention="npu"):
        told = _told("attention", q, q, q)
    missing = "attention has no npu implementation"
    assert told == {"npu": missing, "library": "available", "reference": "available"}
    with use("npu"):
        assert _told("rms_norm", q[:1, :1]) == {"npu": "rms_norm has no npu implementation", "reference": "chosen"}


def _told(op: str, *arguments: Any) -> dict[str, str]:
    """What `explain` says of all backends but those that depend on the machine, of calls that these don't serve."""
    return {
        backend: told for backend, told in explain(op, *arguments).items() if backend not in ("triton", "cuda", "cpu")
    }


def test_a_slower_backend_serves_only_those_who_ask(toy: str):
    backends.register(toy, "cpu", Implementation(torch.clone, why_slower=lambda x: "the library is measured faster"))
    assert choose(toy, ON_CPU) == "library"
    with use("cpu"):
        assert choose(toy, ON_CPU) == "cpu"
    with use(toy="cpu"):
        assert choose(toy, ON_CPU) == "cpu"


def test_explain_computes_nothing(toy: str, monkeypatch: pytest.MonkeyPatch):
    def fail(*arguments: Any) -> None:
        raise AssertionError

    for op in ("attention", "rms_norm"):
        names = [name for name in backends.backends_of(op) if name != "cpu"]
        table = {name: Implementation(fail, is_plain=True) for name in names}
        monkeypatch.setitem(backends._implementations, op, table)
    assert _told("rms_norm", ON_CPU) == {"reference": "chosen"}
    with pytest.raises(AssertionError):
        rms_norm(ON_CPU)


def test_backward_runs_on_the_backend_of_forward_also_in_another_thread(monkeypatch: pytest.MonkeyPatch):
    ran = []

    def backward(
        grads: list[Tensor], wanted: list[bool], saved: list[Tensor], x: Tensor, factors: list[int]
    ) -> list[Tensor | None]:
        assert wanted == [True, False]
        assert saved == []
        ran.append("cpu")
        return [grads[0] * factors[0], None]

    def double(x: Tensor, factors: list[int]) -> Tensor:
        return x * factors[0]

    monkeypatch.setattr(backends, "_implementations", dict(backends._implementations))
    register_op("toy_scale", "(Tensor x, int[] factors) -> Tensor", double)
    backends.register("toy_scale", "cpu", Implementation(double, backward))
    backends.register("toy_scale", "library", Implementation(double))  # its backward recomputes the reference
    for backend, expected in (("cpu", ["cpu"]), ("library", [])):
        ran.clear()
        x = torch.ones(3, requires_grad=True)
        with use(toy_scale=backend):
            out = call("toy_scale", x, [3, 4])
        with use(toy_scale="reference"):
            thread = Thread(target=lambda out=out: out.sum().backward())
            thread.start()
            thread.join()
        assert torch.equal(x.grad, torch.full((3,), 3.0))
        assert ran == expected


def test_orders_are_read_from_the_environment():
    read = backends._read_environment
    assert read("") == {}
    assert read("triton") == {"*": "triton"}
    assert read(" reference, attention = library,") == {"*": "reference", "attention": "library"}
    with pytest.raises(ValueError, match=r"OPENSORA_KERNELS_BACKEND: backend must be one of .*, got 'fast'"):
        read("fast")
    with pytest.raises(ValueError, match="OPENSORA_KERNELS_BACKEND: there is no operator 'convolution'"):
        read("convolution=cuda")


def test_the_environment_orders_in_a_fresh_process():
    program = (
        "import torch; from opensora_kernels import BackendError, attention, explain, rms_norm, use\n"
        "q = torch.ones(2, 40, 4, 8)\n"
        "print(explain('attention', q, q, q)['reference'])\n"
        "try: rms_norm(q)\n"
        "except BackendError as error: print(str(error).splitlines()[1])\n"
        "with use(rms_norm='reference'): print(rms_norm(q).shape)\n"
    )
    environment = {**os.environ, "OPENSORA_KERNELS_BACKEND": "reference,rms_norm=cuda"}
    command = [sys.executable, "-c", program]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines() == [
        "chosen",
        "  cuda: rms_norm has no cuda implementation",
        "torch.Size([2, 40, 4, 8])",
    ]


def test_compiled_code_follows_a_new_order():
    compiled = torch.compile(lambda q: attention(q, q, q), backend="aot_eager", fullgraph=True)
    q = torch.randn(1, 40, 2, 8, generator=torch.Generator().manual_seed(0))
    with use(attention="library"):
        compiled(q)
    with torch._dynamo.config.patch(error_on_recompile=True):
        with use(attention="library"):
            compiled(q)
        with use(attention="reference"), pytest.raises(torch._dynamo.exc.RecompileError):
            compiled(q)
