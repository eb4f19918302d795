"""Inputs of pack_shards: small ones for tests, the exchanges of a sequence-parallel STDiT for benches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from opensora_kernels.cases import BadCall, Case, Maker


def _make(*shape: int, num_shards: int, dim: int, num_tensors: int = 1) -> Callable[[Maker], dict[str, Any]]:
    def make(draw: Maker) -> dict[str, Any]:
        tensors = [draw.normal(*shape) for _ in range(num_tensors)]
        return {"tensors": tensors, "num_shards": num_shards, "dim": dim}

    return make


def _make_qkv(*shape: int, num_shards: int) -> Callable[[Maker], dict[str, Any]]:
    """q, k and v as views of one projection (*, L, 3, N, D), heads to be cut."""
    *leading, num_heads, head_size = shape

    def make(draw: Maker) -> dict[str, Any]:
        qkv = draw.normal(*leading, 3, num_heads, head_size)
        return {"tensors": list(qkv.unbind(-3)), "num_shards": num_shards, "dim": -2}

    return make


CASES = [
    Case("small", _make(2, 4, 6, 8, num_shards=2, dim=-2)),
    Case("odd", _make(3, 5, 7, 9, num_shards=4, dim=-2, num_tensors=2)),
    Case("tokens", _make(2, 11, 3, 8, num_shards=3, dim=-3, num_tensors=3)),
    Case("views_of_qkv", _make_qkv(2, 5, 7, 8, num_shards=3)),
    Case("views_of_transposed", lambda draw: {"tensors": [draw.normal(3, 6, 4).mT], "num_shards": 4, "dim": 1}),
    Case("more_shards_than_heads", _make(2, 3, 2, 4, num_shards=5, dim=-2)),
    Case("one_shard", _make(2, 3, 4, num_shards=1, dim=1)),
    Case("wide_rows", _make(2, 7, 650, num_shards=2, dim=1)),
    Case("first_axis", _make(7, 3, num_shards=2, dim=0)),
    Case("last_axis", _make(3, 10, num_shards=4, dim=-1)),
    Case("size_one", _make(1, 1, 1, 1, num_shards=1, dim=-2)),
    Case("empty_batch", _make(0, 4, 6, 8, num_shards=2, dim=-2)),
    Case(
        "stdit3_720p_4s_qkv_8_ranks", _make_qkv(60, 450, 16, 72, num_shards=8),
        is_large=True, source="STDiT3-XL/2 spatial attention at 720p, 4 s, guided: q, k, v of one of 8 ranks",
    ),
    Case(
        "stdit3_720p_4s_out_8_ranks", _make(60, 3600, 2, 72, num_shards=8, dim=-3),
        is_large=True, source="the same, the result of attention on its way back",
    ),
    Case(
        "stdit3_720p_4s_qkv_7_ranks", _make_qkv(60, 515, 16, 72, num_shards=7),
        is_large=True, source="the same on 7 ranks: 3 or 2 heads each",
    ),
]  # fmt: skip

ERRORS = [
    BadCall("no_tensors", lambda a: a | {"tensors": []}, ValueError, "pack_shards: tensors must hold at least one"),
    BadCall("a_number", lambda a: a | {"tensors": [1]}, TypeError, r"pack_shards: tensors\[0\] must be a tensor"),
    BadCall(
        "two_dtypes", lambda a: a | {"tensors": [a["tensors"][0], a["tensors"][0].half()]}, TypeError,
        r"pack_shards: tensors\[1\] must have tensors\[0\]'s dtype torch.float32, got torch.float16",
    ),
    BadCall(
        "two_shapes", lambda a: a | {"tensors": [a["tensors"][0], a["tensors"][0][:1]]}, ValueError,
        r"pack_shards: tensors\[1\] must have tensors\[0\]'s shape \(2, 4, 6, 8\), got \(1, 4, 6, 8\)",
    ),
    BadCall(
        "two_devices", lambda a: a | {"tensors": [a["tensors"][0], a["tensors"][0].to("meta")]}, ValueError,
        "pack_shards: all tensors must be on one device",
    ),
    BadCall("no_shards", lambda a: a | {"num_shards": 0}, ValueError, "pack_shards: num_shards must be at least 1"),
    BadCall("fifth_axis", lambda a: a | {"dim": 4}, ValueError, "pack_shards: dim must be one of the 4 axes, got 4"),
]  # fmt: skip
