"""The accuracy rule: truth is the reference on fp64 inputs; a kernel may be off by twice what PyTorch's chain is."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

# "A few ULP of the truth's scale": results rounded at up to eight points may be 8 half-ULP off where PyTorch is lucky.
NUM_ULP = 4


def assert_accurate(
    actual: object,
    at_same_dtype: object,
    truth: object,
    what: str,
    *,
    coarsest: torch.dtype | None = None,
    is_chain: bool = False,
    leniency: float = 1.0,
) -> None:
    """Max and RMS error of `actual` against `truth` at most twice that of `at_same_dtype`, plus NUM_ULP; no NaN.

    ULP are those of each result's dtype or, if coarser, of `coarsest`: an fp32 gradient of fp32 angles that is computed
    from bf16 numbers is no better than they are. `is_chain`: of hundreds of operators, whose largest error is chance in
    either; the RMS alone is compared. `leniency` multiplies what is allowed: for figures of other people's code, or by
    how many times as often something is rounded.
    """
    triples = zip(*(_tensors(tree) for tree in (actual, at_same_dtype, truth)), strict=True)
    for index, (have, plain, true) in enumerate(triples):
        assert have.shape == true.shape, f"{what}[{index}]: shape {tuple(have.shape)}, truth {tuple(true.shape)}"
        assert have.dtype == plain.dtype, f"{what}[{index}]: dtype {have.dtype}, PyTorch {plain.dtype}"
        if not have.numel():
            continue
        if not have.is_floating_point():
            assert torch.equal(have, true), f"{what}[{index}]: values differ"
            continue
        eps = max(torch.finfo(dtype).eps for dtype in (have.dtype, coarsest or have.dtype))
        slack = NUM_ULP * eps * true.abs().max().item()
        for name, size in (("rms", _rms),) if is_chain else (("max", _max), ("rms", _rms)):
            error, allowed = size(have.double() - true), leniency * (2 * size(plain.double() - true) + slack)
            assert error <= allowed, f"{what}[{index}]: {name} error {error:.3g}, allowed {allowed:.3g}"


def assert_near_truth(actual: object, truth: object, dtype: torch.dtype, what: str) -> None:
    """The reference's own rule, since it has nothing to be compared with but fp64: RMS error within NUM_ULP roundings
    of the case's `dtype`, and never NaN. What it computes is checked against independent formulas in each operator's
    test file."""
    for index, (have, true) in enumerate(zip(_tensors(actual), _tensors(truth), strict=True)):
        assert have.shape == true.shape, f"{what}[{index}]: shape {tuple(have.shape)}, truth {tuple(true.shape)}"
        if have.numel() and have.is_floating_point():
            # fp32 statistics of an output that was rounded to bf16 are no better than that output
            eps = max(torch.finfo(have.dtype).eps, torch.finfo(dtype).eps)
            error, allowed = _rms(have.double() - true), NUM_ULP * eps * _rms(true.double())
            assert error <= allowed, f"{what}[{index}]: rms error {error:.3g}, allowed {allowed:.3g}"


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _max(error: Tensor) -> float:
    return error.abs().max().item()


def _rms(error: Tensor) -> float:
    return error.square().mean().sqrt().item()
