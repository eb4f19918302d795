"""fp32 weights for the optimizer, and what the modules compute with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from opensora.parallel import ParallelContext

# Gradients that every rank holds whole are averaged this many at a time (64 MiB in fp32).
BUCKET_NUMEL = 16 << 20


class TrainedWeights:
    """The trainable weights of some modules, with fp32 masters: what the optimizer and averages work on.

    A master is a plain tensor: of a sharded parameter this rank's shard, else the whole. Sharded parameters are fp32
    and so are their own masters, as are all at fp32. Modules that are not sharded are cast to `dtype` below fp32 and
    get masters of their own, as upstream's trainer does: at lr 1e-4 a bf16 weight would lose most updates to rounding.
    Names are "module.parameter"; the first values of frozen parameters and buffers are kept for `export`.
    Errors: ValueError when nothing requires a gradient, or when sharded modules compute in another dtype.
    """

    def __init__(self, modules: Mapping[str, nn.Module], dtype: torch.dtype, context: ParallelContext) -> None:
        self.modules = dict(modules)
        self.context = context
        for module in modules.values():
            for part in module.modules():
                if isinstance(part, FSDPModule):  # a forward pass without a backward one has left it whole
                    part.reshard()
        named = [(f"{m}.{n}", p) for m, module in modules.items() for n, p in module.named_parameters()]
        self.names = [name for name, parameter in named if parameter.requires_grad]
        self.parameters = [parameter for _, parameter in named if parameter.requires_grad]
        if not self.parameters:
            raise ValueError("training: at least one parameter must require a gradient, got none")
        self._sharded_modules = [module for module in modules.values() if isinstance(module, FSDPModule)]
        if self._sharded_modules and dtype != context.dtype:
            raise ValueError(
                f"training: run.dtype must be what sharded modules compute in, {context.dtype}, got {dtype}"
            )
        self.is_sharded = [isinstance(parameter, DTensor) for parameter in self.parameters]
        self._layouts = {name: parameter for name, parameter in named if isinstance(parameter, DTensor)}
        # Sorted: every rank must make them in one order.
        kinds = sorted({"cpu", context.device.type}) if self._layouts else []
        self._meshes = {kind: context.all_ranks(kind) for kind in kinds}
        self._constants = self._cast(dtype)
        self._has_copy = [not is_sharded and dtype != torch.float32 for is_sharded in self.is_sharded]

    def _cast(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Puts the modules into `dtype`, and makes the masters; returns what was there of all else."""
        with torch.no_grad():
            if dtype == torch.float32:
                self.masters = [local(parameter) for parameter in self.parameters]
                return {}
            self.masters = [
                local(parameter) if isinstance(parameter, DTensor) else parameter.detach().to(torch.float32, copy=True)
                for parameter in self.parameters
            ]
            trained = set(self.names)
            state = self._unique_state()
            constants = {
                name: tensor if isinstance(tensor, DTensor) else tensor.clone()
                for name, tensor in state.items()
                if name not in trained
            }
            for module in self.modules.values():
                if not isinstance(module, FSDPModule):
                    module.to(dtype)
                    continue
                for buffer in module.buffers():
                    if buffer.is_floating_point():
                        buffer.data = buffer.to(dtype)
            return constants

    def set_gradient_sync(self, is_on: bool) -> None:
        """Whether the next backward pass averages the gradients of sharded parameters over the ranks."""
        for module in self._sharded_modules:
            module.set_requires_gradient_sync(is_on)

    @torch.no_grad()
    def collect_gradients(self, *, is_last: bool) -> None:
        """Adds the parameters' gradients to the masters' in fp32 and clears them; call after each backward.

        After the last one they are averaged over all ranks, and a master without a gradient gets zeros: whether a
        weight was used may differ from rank to rank, and all must take the same steps.
        """
        for parameter, master, has_copy, is_sharded in self._quadruples():
            if is_sharded and not is_last:  # FSDP keeps what was not averaged yet
                continue
            if master is not parameter and parameter.grad is not None:
                gradient = local(parameter.grad)
                if master.grad is None:
                    master.grad = gradient.to(torch.float32) if has_copy else gradient
                else:
                    master.grad += gradient
                parameter.grad = None
            if is_last and master.grad is None:
                master.grad = torch.zeros_like(master)
        if is_last and self.context.world_size > 1:
            self._average_whole_gradients()

    def _average_whole_gradients(self) -> None:
        bucket: list[Tensor] = []
        whole = [m.grad for _, m, _, is_sharded in self._quadruples() if not is_sharded and m.grad is not None]
        for i, gradient in enumerate(whole):
            bucket.append(gradient)
            if i + 1 == len(whole) or sum(tensor.numel() for tensor in bucket) >= BUCKET_NUMEL:
                flat = torch.cat([tensor.flatten() for tensor in bucket])
                self.context.total(flat).div_(self.context.world_size)
                parts = flat.split([tensor.numel() for tensor in bucket])
                torch._foreach_copy_(bucket, [part.view_as(t) for part, t in zip(parts, bucket, strict=True)])
                bucket = []

    @torch.no_grad()
    def clip_gradients(self, max_norm: float) -> Tensor:
        """Scales the masters' gradients so that their norm over all ranks is at most `max_norm` (0: not at all).

        Returns the norm before, a scalar that is the same on every rank.
        """
        norms = []
        for is_sharded in (False, True):
            gradients = [m.grad for _, m, _, kind in self._quadruples() if kind == is_sharded and m.grad is not None]
            if gradients:
                norm = torch.nn.utils.get_total_norm(gradients)
                norms.append(self.context.total(norm.square()).sqrt() if is_sharded else norm)
        total = norms[0] if len(norms) == 1 else torch.stack([norm.to(norms[0].device) for norm in norms]).norm()
        torch.nn.utils.clip_grads_with_norm_(self.masters, max_norm or float("inf"), total)
        return total

    def clear_gradients(self) -> None:
        for tensor in (*self.masters, *self.parameters):
            tensor.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """Copies the masters into the parameters, rounded to their precision; call after each optimizer step."""
        pairs = [(parameter, master) for parameter, master, has_copy, _ in self._quadruples() if has_copy]
        if pairs:
            torch._foreach_copy_([parameter for parameter, _ in pairs], [master for _, master in pairs])

    @contextmanager
    def replaced_by(self, values: list[Tensor]) -> Iterator[None]:
        """Computes with `values` (say, averaged weights) inside the block, sharded modules whole; see `whole`."""
        with torch.no_grad():
            places = [local(parameter) for parameter in self.parameters]
            kept = [m if has_copy else m.detach().clone() for _, m, has_copy, _ in self._quadruples()]
            torch._foreach_copy_(places, values)
        try:
            with self.context.whole(*self.modules.values()):
                yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(places, kept)

    def state_dict(self) -> dict[str, Tensor]:
        """Masters, frozen parameters as first given and buffers as they are now, on this rank; tied parameters once."""
        frozen = {name: t for name, t in self._constants.items() if name in self._frozen()}
        state = self._unique_state() | frozen
        return {name: local(tensor) for name, tensor in state.items()} | dict(
            zip(self.names, self.masters, strict=True)
        )

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes what `state_dict` gave: the same names and shapes, on any device."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])
        now = self._unique_state()
        for name in self._constants.keys() & self._frozen():
            local(now[name]).copy_(local(self._constants[name]))
        self.publish()

    def global_tensor(self, name: str, tensor: Tensor) -> Tensor:
        """This rank's part of `name`, on any device, as a tensor that knows of the others' parts."""
        layout = self._layouts.get(name)
        if layout is None:
            return tensor
        mesh = self._meshes[tensor.device.type]
        return DTensor.from_local(
            tensor, mesh, layout.placements, run_check=False, shape=layout.shape, stride=layout.stride()
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of everything in `state_dict`, whole."""
        return {name: tuple(self._layouts.get(name, tensor).shape) for name, tensor in self.state_dict().items()}

    def export(self, values: list[Tensor] | None = None) -> dict[str, dict[str, Tensor]]:
        """{module: state} with `values` (default: the masters) for the trained weights and the rest as first given.

        Whole tensors; among several ranks in host memory, and on the main rank alone (elsewhere empty). All ranks call.
        """
        merged = self._unique_state() | self._constants | dict(zip(self.names, values or self.masters, strict=True))
        states: dict[str, dict[str, Tensor]] = {module: {} for module in self.modules}
        for name, tensor in merged.items():
            if name in self._layouts:
                tensor = self.global_tensor(name, local(tensor.detach())).full_tensor()
            if self.context.is_main:
                module = next(module for module in self.modules if name.startswith(f"{module}."))
                tensor = tensor.detach()
                is_alone = self.context.world_size == 1
                states[module][name[len(module) + 1 :]] = tensor if is_alone else tensor.to("cpu")
        return states

    def _frozen(self) -> set[str]:
        named = {f"{m}.{n}" for m, module in self.modules.items() for n, _ in module.named_parameters()}
        return named - set(self.names)

    def _quadruples(self) -> zip[tuple[Tensor, Tensor, bool, bool]]:
        return zip(self.parameters, self.masters, self._has_copy, self.is_sharded, strict=True)

    def _unique_state(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for prefix, module in self.modules.items():
            parameters = dict(module.named_parameters())
            aliases = {name for name, _ in module.named_parameters(remove_duplicate=False)}
            buffers = {name: t for name, t in module.state_dict().items() if name not in aliases}
            state.update({f"{prefix}.{name}": t.detach() for name, t in (parameters | buffers).items()})
        return state


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; any other as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()
