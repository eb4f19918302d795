"""Which form of causal_conv3d a measured table picks for a layer; without a measurement, PyTorch's own chain."""

from __future__ import annotations

from typing import Any

from opensora_kernels.tuning import configuration, device_name

CHAIN, LIBRARY, GEMM = 0, 1, 2


def form_of(*values: Any) -> int:
    """The Triton form for these arguments: the measured one, or GEMM for who asks for Triton where none is."""
    measured = _measured(*values)
    return GEMM if measured in (None, CHAIN) else measured


def why_slower(*values: Any) -> str | None:
    """Why PyTorch's norm, padding and convolution are thought faster than either form, or None."""
    measured = _measured(*values)
    if measured is None:
        return (
            f"{_key(*values)} was never measured on {device_name(values[0].device)}: PyTorch's own chain is the choice"
        )
    if measured == CHAIN:
        return f"PyTorch's own chain is measured faster for {_key(*values)} on {device_name(values[0].device)}"
    return None


def _measured(*values: Any) -> int | None:
    return configuration("causal_conv3d", _key(*values), {}, values[0].device).get("FORM")


def _key(*values: Any) -> str:
    """Of a layer, whatever the size of its clip."""
    x, weight, _, stride, dilation, groups = values[:6]
    kernel, steps, spread = ("x".join(map(str, sizes)) for sizes in (weight.shape[2:], stride, dilation))
    layout = "channels_last" if x.stride(1) == 1 and x.shape[1] > 1 and not x.is_contiguous() else "contiguous"
    norm = values[11] or "no norm"
    return (
        f"form {x.shape[1]}->{weight.shape[0]} kernel {kernel} stride {steps} dilation {spread} groups {groups}, "
        f"{norm}, {layout}, {x.dtype}"
    )
