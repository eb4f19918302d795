"""Where a process stands among its peers: rank, device and process groups, passed along as a value.

Ranks form a mesh data x ring x ulysses, the last changing fastest, so that those which talk most are neighbours. Ranks
of one row of `ring` and `ulysses` share their batches and cut the tokens among them; rows read different batches.
Weights are sharded over all ranks (FSDP2) or whole on each.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from opensora.config import ParallelConfig

if TYPE_CHECKING:
    from opensora_kernels import SequenceShards

ModuleT = TypeVar("ModuleT", bound=nn.Module)
# What `config.Precision` names.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class ParallelContext:
    """Rank, device and groups of this process.

    `mesh` has the axes ("data", "ring", "ulysses"); `data_group` holds the ranks that see different batches, `sequence`
    those that share one batch and split its tokens; either is None where its axes have size one. `host_group` is gloo
    among all ranks, for host memory and Python values; `checkpoint_group` another one, for the thread that writes.
    `dtype` is what sharded modules compute in. `launch` names the launch this process belongs to and `num_restarts`
    says how often the launcher has started it again.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mesh: DeviceMesh | None = None
    data_group: ProcessGroup | None = None
    sequence: SequenceShards | None = None
    host_group: ProcessGroup | None = None
    checkpoint_group: ProcessGroup | None = None
    config: ParallelConfig = field(default_factory=ParallelConfig)
    dtype: torch.dtype = torch.float32
    launch: str = ""
    num_restarts: int = 0

    @classmethod
    def single_process(cls, device: str | torch.device = "auto") -> ParallelContext:
        """The context of a process without peers; `device` "auto" takes the accelerator where there is one."""
        return cls(device=resolve_device(device))

    @classmethod
    def from_environment(
        cls,
        config: ParallelConfig,
        device: str | torch.device = "auto",
        *,
        dtype: torch.dtype = torch.float32,
        environment: Mapping[str, str] | None = None,
    ) -> ParallelContext:
        """The context that torchrun's variables describe (`environment`, default: the process's); one process without.

        Starts the process groups: gloo for host memory, beside it NCCL or HCCL on such devices, all with
        `config.timeout`. `dtype` is what sharded modules will compute in. `close()` ends the groups.
        Errors: ValueError when `ulysses` x `ring` does not divide the number of processes, and for `cpu_offload` of
        weights that are not sharded.
        """
        environment = os.environ if environment is None else environment
        world_size = int(environment.get("WORLD_SIZE", 1))
        _check_mesh(config, world_size)
        launch = {"launch": _launch(environment), "num_restarts": int(environment.get("TORCHELASTIC_RESTART_COUNT", 0))}
        device = resolve_device(device)
        if config.cpu_offload and world_size == 1 and device.type != "cpu":
            raise ValueError(f"parallel.cpu_offload must be false for one process, whose weights stay on {device}")
        if world_size == 1:
            return cls(device=device, config=config, dtype=dtype, **launch)
        if device.type != "cpu":
            device = torch.device(device.type, int(environment["LOCAL_RANK"]))
            torch.accelerator.set_device_index(device.index)
        timeout = timedelta(seconds=config.timeout)
        backend = "gloo"
        if device.type != "cpu":
            backend = f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device.type)}"
        store, rank, _ = next(dist.rendezvous("env://", timeout=timeout))
        # torchrun keeps one store for all attempts; torch 2.13 would find in it where ranks of the last one listened.
        attempt = dist.PrefixStore(f"attempt {launch['num_restarts']} of {world_size}", store)
        dist.init_process_group(backend, store=attempt, rank=rank, world_size=world_size, timeout=timeout)
        return cls.of_world(config, device, dtype=dtype, **launch)

    @classmethod
    def of_world(
        cls, config: ParallelConfig, device: torch.device, *, dtype: torch.dtype = torch.float32, **launch: Any
    ) -> ParallelContext:
        """The context over the default process group, which is running. Errors: as `from_environment`."""
        rank, world_size, timeout = dist.get_rank(), dist.get_world_size(), timedelta(seconds=config.timeout)
        _check_mesh(config, world_size)
        num_data = world_size // (config.ring * config.ulysses)
        sizes = {"data": num_data, "ring": config.ring, "ulysses": config.ulysses}
        mesh = init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        groups = {name: mesh.get_group(name) if size > 1 else None for name, size in sizes.items()}
        return cls(
            rank=rank,
            world_size=world_size,
            device=device,
            mesh=mesh,
            data_group=groups["data"],
            sequence=_sequence(groups, rank, num_data, timeout),
            host_group=dist.new_group(backend="gloo", timeout=timeout),
            checkpoint_group=dist.new_group(backend="gloo", timeout=timeout),
            config=config,
            dtype=dtype,
            **launch,
        )

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
        """How many batches are read at a time."""
        return 1 if self.data_group is None else dist.get_world_size(self.data_group)

    def wrap(self, module: ModuleT, *, is_sharded: bool = True) -> ModuleT:
        """The module as this context trains it: on the device, and sharded over all ranks where that is configured.

        A sharded module (FSDP2; each element of its own ModuleLists, then the rest) keeps fp32 shards and computes in
        `dtype` with whatever inputs it is given; it is the same object, and `forward` is the one method that may be
        called outside of `whole`. Pass `is_sharded=False` for a small module that others differentiate through, such
        as a discriminator: its weights are then whole on each rank.
        Every rank must pass the same weights: seed before building, or load a file.
        """
        if self.world_size == 1 or self.config.sharding == "none" or not is_sharded:
            return module.to(self.device)
        # 0.7 s to import, which sampling need not wait for.
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

        # The warning is about changing an output in place, which no model of ours does, and comes for every block.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        offload = OffloadPolicy()
        if self.config.cpu_offload and self.device.type != "cpu":
            offload = CPUOffloadPolicy()
        options = {
            "mesh": self.all_ranks(self.device.type),
            # Inputs are not cast: the models decide what stays fp32 (timesteps, rotary tables), as with bf16 weights.
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=self.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
            ),
            "offload_policy": offload,
        }
        for parameter in module.parameters():  # FSDP takes no other layout, such as channels_last
            parameter.data = parameter.data.contiguous()
        module.register_forward_hook(_open_dataclasses)  # before FSDP's own, which looks for tensors in the output
        for blocks in module.children():
            for block in blocks if isinstance(blocks, nn.ModuleList) else ():
                fully_shard(block, **options)
        fully_shard(module, **options)
        # Without it (torch 2.10, say) every rank must use the same weights in a step.
        if hasattr(module, "set_reduce_scatter_unused_params"):
            module.set_reduce_scatter_unused_params(True)
        return module

    @contextmanager
    def whole(self, *modules: nn.Module) -> Iterator[None]:
        """Inside, sharded modules hold whole weights in their computing precision, and any method may be called.

        All ranks enter together; inside, a rank may compute alone. No gradients.
        """
        from torch.distributed.fsdp import FSDPModule

        sharded = [part for module in modules for part in module.modules() if isinstance(part, FSDPModule)]
        roots = [module for module in modules if isinstance(module, FSDPModule)]
        for part in sharded:
            part.unshard()
            part.set_reshard_after_forward(False, recurse=False)
        try:
            yield
        finally:
            for part in sharded:
                part.set_reshard_after_forward(part not in roots, recurse=False)
                part.reshard()

    def all_ranks(self, device_type: str) -> DeviceMesh:
        """One axis over all ranks, for tensors on devices of that type."""
        return init_device_mesh(device_type, (self.world_size,), mesh_dim_names=("all",))

    def mean(self, values: Tensor) -> Tensor:
        """The average over the ranks that see different batches, in place."""
        if self.data_group is not None:
            dist.all_reduce(values, op=dist.ReduceOp.SUM, group=self.data_group)
            values /= self.data_world_size
        return values

    def total(self, values: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.SUM)
        return values

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, on every rank, in their order; a few numbers or strings."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def from_main(self, value: Any) -> Any:
        """The main rank's value on every rank; all ranks wait for it."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.host_group)
        return values[0]

    def close(self) -> None:
        """End the process groups; a process without peers has none."""
        if self.world_size > 1:
            dist.destroy_process_group()


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


def _open_dataclasses(module: nn.Module, arguments: Any, output: Any) -> None:
    """Let PyTorch see the tensors of an output that is a dataclass: FSDP's backward pass starts at them."""
    from torch.utils._pytree import SUPPORTED_NODES

    if is_dataclass(output) and not isinstance(output, type):
        if type(output) not in SUPPORTED_NODES:
            torch.export.register_dataclass(type(output))
        for item in fields(output):
            _open_dataclasses(module, arguments, getattr(output, item.name))
    elif isinstance(output, (list, tuple)):
        for item in output:
            _open_dataclasses(module, arguments, item)


def _check_mesh(config: ParallelConfig, world_size: int) -> None:
    for name, value in (("ulysses", config.ulysses), ("ring", config.ring)):
        if value < 1:
            raise ValueError(f"parallel.{name} must be at least 1, got {value}")
    if config.timeout <= 0:
        raise ValueError(f"parallel.timeout must be positive seconds, got {config.timeout}")
    if config.cpu_offload and config.sharding == "none":
        raise ValueError("parallel.cpu_offload must be false for weights that are not sharded (parallel.sharding none)")
    if world_size % (config.ulysses * config.ring):
        raise ValueError(
            f"parallel: ulysses x ring must divide the number of processes, {world_size}, got {config.ulysses} x "
            f"{config.ring} (torchrun --nproc-per-node sets how many there are)"
        )


def _launch(environment: Mapping[str, str]) -> str:
    """What all processes and restarts of one torchrun have in common, and no other; "" without torchrun."""
    name = environment.get("TORCHELASTIC_RUN_ID", "")
    return f"process {os.getppid()}" if name == "none" else name  # "none": no --rdzv-id was given


def _sequence(
    groups: Mapping[str, ProcessGroup | None], rank: int, num_data: int, timeout: timedelta
) -> SequenceShards | None:
    ring, ulysses = groups["ring"], groups["ulysses"]
    if ring is None and ulysses is None:
        return None
    from opensora_kernels import SequenceShards

    both = ring or ulysses
    if ring is not None and ulysses is not None:
        size = dist.get_world_size() // num_data
        for first in range(0, dist.get_world_size(), size):  # every rank takes part in making every group
            group = dist.new_group(list(range(first, first + size)), timeout=timeout)
            both = group if first <= rank < first + size else both
    return SequenceShards(ulysses=ulysses, ring=ring, group=both)
