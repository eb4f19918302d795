"""Where a process stands among its peers: rank, device and process groups, passed along as a value.

One process is the only layout so far. Code that will differ across ranks already goes through this value: `wrap` is
where a model becomes sharded (FSDP2), `data_group` averages losses, `sequence_group` splits tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

ModuleT = TypeVar("ModuleT", bound=nn.Module)
# What `config.Precision` names.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class ParallelContext:
    """Rank, device and groups of this process.

    `mesh` has the axes ("data", "sequence"); `data_group` holds the ranks that see different batches, `sequence_group`
    those that share one batch and split its tokens. A group is None where the axis has size one.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mesh: DeviceMesh | None = None
    data_group: ProcessGroup | None = None
    sequence_group: ProcessGroup | None = None
    sequence: Any = None

    @classmethod
    def single_process(cls, device: str | torch.device = "auto") -> ParallelContext:
        """The context of a process without peers; `device` "auto" takes the accelerator where there is one."""
        return cls(device=resolve_device(device))

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which share of the batches this rank reads."""
        return 0 if self.data_group is None else dist.get_rank(self.data_group)

    @property
    def data_world_size(self) -> int:
        return 1 if self.data_group is None else dist.get_world_size(self.data_group)

    def wrap(self, module: ModuleT) -> ModuleT:
        """The module as this context trains it: moved to the device; sharded over the mesh once there is one."""
        if self.world_size != 1:
            raise ValueError(f"ParallelContext: training needs world_size 1 in this version, got {self.world_size}")
        return module.to(self.device)

    def mean(self, values: Tensor) -> Tensor:
        """The average over the ranks that see different batches, in place."""
        if self.data_group is not None:
            dist.all_reduce(values, op=dist.ReduceOp.SUM, group=self.data_group)
            values /= self.data_world_size
        return values


def resolve_device(device: str | torch.device) -> torch.device:
    """The device of that name; "auto" is the current accelerator (CUDA, NPU, ...) or the CPU.

    Errors: ValueError for a name that torch does not know and for an accelerator that this machine lacks.
    """
    present = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device == "auto":
        return present or torch.device("cpu")
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: must be auto or a device torch knows, got {device!r}") from error
    if device.type not in ("cpu", "meta") and (present is None or device.type != present.type):
        has = f"cpu and {present.type}" if present is not None else "only cpu"
        raise ValueError(f"device: must be one that this machine has ({has}), got {str(device)!r}")
    return device
