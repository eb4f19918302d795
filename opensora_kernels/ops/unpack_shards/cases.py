"""Inputs of unpack_shards: small ones for tests, the exchanges of a sequence-parallel STDiT for benches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from opensora_kernels.cases import BadCall, Case, Maker


def _make(*shape: int, num_shards: int, dim: int, num_tensors: int = 1) -> Callable[[Maker], dict[str, Any]]:
    options = {"shape": shape, "num_shards": num_shards, "dim": dim, "num_tensors": num_tensors}
    return lambda draw: {"packed": draw.normal(num_tensors * math.prod(shape)), **options}


CASES = [
    Case("small", _make(2, 6, 4, 8, num_shards=2, dim=-3)),
    Case("odd", _make(3, 11, 5, 9, num_shards=4, dim=-3, num_tensors=2)),
    Case("heads", _make(2, 5, 7, 8, num_shards=3, dim=-2, num_tensors=3)),
    Case("more_shards_than_tokens", _make(2, 3, 2, 4, num_shards=5, dim=-3)),
    Case("one_shard", _make(2, 3, 4, num_shards=1, dim=1)),
    Case("wide_rows", _make(2, 7, 650, num_shards=2, dim=1)),
    Case("first_axis", _make(7, 3, num_shards=2, dim=0)),
    Case("last_axis", _make(3, 10, num_shards=4, dim=-1)),
    Case("size_one", _make(1, 1, 1, 1, num_shards=1, dim=-3)),
    Case("empty_batch", _make(0, 6, 4, 8, num_shards=2, dim=-3)),
    Case(
        "stdit3_720p_4s_qkv_8_ranks", _make(60, 3600, 2, 72, num_shards=8, dim=-3, num_tensors=3),
        is_large=True, source="STDiT3-XL/2 spatial attention at 720p, 4 s, guided: q, k, v of one of 8 ranks",
    ),
    Case(
        "stdit3_720p_4s_out_8_ranks", _make(60, 450, 16, 72, num_shards=8, dim=-2),
        is_large=True, source="the same, the result of attention on its way back",
    ),
    Case(
        "stdit3_720p_4s_qkv_7_ranks", _make(60, 3600, 3, 72, num_shards=7, dim=-3, num_tensors=3),
        is_large=True, source="the same on 7 ranks: 515 or 514 tokens each",
    ),
]  # fmt: skip

ERRORS = [
    BadCall("a_number", lambda a: a | {"packed": 1}, TypeError, "unpack_shards: packed must be a tensor, got int"),
    BadCall(
        "short", lambda a: a | {"packed": a["packed"][1:]}, ValueError,
        r"unpack_shards: packed must have shape \(384,\) for 1 tensors of shape \(2, 6, 4, 8\), got \(383,\)",
    ),
    BadCall(
        "two_axes", lambda a: a | {"packed": a["packed"].view(2, -1)}, ValueError,
        r"unpack_shards: packed must have shape \(384,\)",
    ),
    BadCall("no_shards", lambda a: a | {"num_shards": 0}, ValueError, "num_shards and num_tensors must be at least 1"),
    BadCall("no_tensors", lambda a: a | {"num_tensors": 0}, ValueError, "num_shards and num_tensors must be at least"),
    BadCall("fifth_axis", lambda a: a | {"dim": 4}, ValueError, "unpack_shards: dim must be one of the 4 axes, got 4"),
]  # fmt: skip
