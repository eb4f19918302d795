"""fp32 weights for the optimizer, and the copies in the training precision that the modules compute with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class TrainedWeights:
    """The trainable weights of some modules, with fp32 masters.

    At fp32 the masters *are* the parameters. Below, the modules are cast to `dtype` and the optimizer works on fp32
    masters, as upstream's trainer does: at lr 1e-4 a bf16 weight would lose most updates to rounding.
    Names are "module.parameter"; below fp32 the first values of frozen parameters and buffers are kept for `export`.
    """

    def __init__(self, modules: Mapping[str, nn.Module], dtype: torch.dtype) -> None:
        self.modules = dict(modules)
        named = [(f"{m}.{n}", p) for m, module in modules.items() for n, p in module.named_parameters()]
        self.names = [name for name, parameter in named if parameter.requires_grad]
        self.parameters = [parameter for _, parameter in named if parameter.requires_grad]
        if not self.parameters:
            raise ValueError("training: at least one parameter must require a gradient, got none")
        self.has_masters = dtype != torch.float32
        self._constants: dict[str, Tensor] = {}
        if self.has_masters:
            trained = set(self.names)
            state = self._unique_state()
            self._constants = {name: tensor.clone() for name, tensor in state.items() if name not in trained}
            self.masters = [parameter.detach().to(torch.float32, copy=True) for parameter in self.parameters]
            for module in modules.values():
                module.to(dtype)
        else:
            self.masters = list(self.parameters)

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Adds the parameters' gradients to the masters' in fp32 and clears them; call after each backward."""
        if not self.has_masters:
            return
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.to(torch.float32)
            else:
                master.grad += parameter.grad
            parameter.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """Copies the masters into the parameters, rounded to their precision; call after each optimizer step."""
        if self.has_masters:
            torch._foreach_copy_(self.parameters, self.masters)

    @contextmanager
    def replaced_by(self, values: list[Tensor]) -> Iterator[None]:
        """Computes with `values` (say, averaged weights) inside the block."""
        kept = self.masters if self.has_masters else [master.detach().clone() for master in self.masters]
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, values)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, kept)

    def state_dict(self) -> dict[str, Tensor]:
        """Masters, frozen parameters and buffers as they are now; tied parameters once."""
        return self._unique_state() | dict(zip(self.names, self.masters, strict=True))

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        expected = self.state_dict()
        if set(expected) != set(state):
            missing, unexpected = sorted(set(expected) - set(state)), sorted(set(state) - set(expected))
            raise ValueError(
                f"checkpoint: weights must match the model, got missing {missing}, unexpected {unexpected}"
            )
        for name, tensor in expected.items():
            if tensor.shape != state[name].shape:
                raise ValueError(
                    f"checkpoint: {name} must have shape {tuple(tensor.shape)}, got {tuple(state[name].shape)}"
                )
            tensor.copy_(state[name])
        self.publish()

    def export(self, values: list[Tensor] | None = None) -> dict[str, dict[str, Tensor]]:
        """{module: state} with `values` (default: the masters) for the trained weights and the rest as first given."""
        merged = self._unique_state() | self._constants | dict(zip(self.names, values or self.masters, strict=True))
        return {
            module: {name[len(module) + 1 :]: t.detach() for name, t in merged.items() if name.startswith(f"{module}.")}
            for module in self.modules
        }

    def _unique_state(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for prefix, module in self.modules.items():
            parameters = dict(module.named_parameters())
            aliases = {name for name, _ in module.named_parameters(remove_duplicate=False)}
            buffers = {name: t for name, t in module.state_dict().items() if name not in aliases}
            state.update({f"{prefix}.{name}": t.detach() for name, t in (parameters | buffers).items()})
        return state
