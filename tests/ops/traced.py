"""Which Triton kernels torch.compile sees in each operator: `python -m tests.ops.traced [OP...]`.

Prints operator, kernels in the graph of its forward pass, kernels in that of its backward pass. Needs neither a GPU nor
its driver: tensors are on the meta device. This process must not have TRITON_INTERPRET set.
"""

from __future__ import annotations

import sys
import warnings

import torch
import triton
from functorch.compile import aot_function
from torch import Tensor
from torch.utils import _pytree as pytree
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from opensora_kernels import _triton, backends
from tests.ops.contract import OPS, cases_of, draw


def count_kernels(op: str) -> list[int]:
    """Kernel launches in the graphs of one call of the first case, forward and backward."""
    counts = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        counts.append(sum("triton_kernel_wrapper" in str(node.target) for node in graph.graph.nodes))
        return graph

    flat = backends.flat_arguments(op, **draw(cases_of(op)[0], torch.float32))
    leaves, structure = pytree.tree_flatten(flat)
    positions = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    tensors = [_on_meta(leaves[index]) for index in positions]

    def run(*tensors: Tensor) -> list[Tensor]:
        filled = list(leaves)
        for index, tensor in zip(positions, tensors, strict=True):
            filled[index] = tensor
        values = pytree.tree_unflatten(filled, structure)
        return pytree.tree_leaves(getattr(torch.ops.opensora_kernels, op)(*values, "triton"))

    outputs = aot_function(run, fw_compiler=count, bw_compiler=count)(*tensors)
    sum(out.sum() for out in outputs if out.requires_grad).backward()
    return counts


class _NoDriver(DriverBase):
    """Names a target, so that PyTorch's analysis of what a kernel writes to can run on a machine without a GPU."""

    def __init__(self) -> None:
        pass

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def get_benchmarker(self) -> None:
        raise NotImplementedError


def _on_meta(tensor: Tensor) -> Tensor:
    moved = torch.empty_like(tensor, device="meta")
    return moved.requires_grad_(tensor.is_floating_point())


def main() -> int:
    if _triton.is_interpreted():
        sys.exit("TRITON_INTERPRET must not be set: interpreted kernels can't be traced")
    triton.runtime.driver.set_active(_NoDriver())
    warnings.filterwarnings("ignore", message="Your compiler for AOTAutograd")
    for op in sys.argv[1:] or [op for op in OPS if "triton" in backends.backends_of(op)]:
        print(op, *count_kernels(op), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
