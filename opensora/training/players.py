"""A player: modules that are trained together, with their optimizer and averaged weights.

Most trainings have one; against an adversary there are two.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from opensora.config import OptimizerConfig
from opensora.parallel import ParallelContext
from opensora.training.ema import EMA
from opensora.training.optimizer import MOMENTS, build_optimizer, learning_rate, moments, set_moments
from opensora.training.weights import TrainedWeights, local


class Player:
    """Weights, gradients, optimizer and (unless `averages` is false) the moving average of some modules.

    `prefix` stands before the names of its tensors in checkpoints: "weights.module.parameter", "ema.", "exp_avg.",
    "exp_avg_sq.".
    """

    def __init__(
        self,
        prefix: str,
        modules: Mapping[str, nn.Module],
        config: OptimizerConfig,
        dtype: torch.dtype,
        context: ParallelContext,
        *,
        averages: bool = True,
    ) -> None:
        self.prefix = prefix
        self.config = config
        self.weights = TrainedWeights(modules, dtype, context)
        self.optimizer = build_optimizer(self.weights.masters, config)
        self.average = EMA(self.weights.masters, config.ema_decay) if averages else None
        self.num_updates = 0

    def train(self) -> None:
        for module in self.weights.modules.values():
            module.train()

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Gradients of a micro-batch's share of the loss; averaged over the ranks after the last micro-batch."""
        self.weights.set_gradient_sync(is_last)
        if loss.requires_grad:
            loss.backward()
        self.weights.collect_gradients(is_last=is_last)

    def clip(self) -> Tensor:
        """The global norm of the gradient before it was clipped."""
        return self.weights.clip_gradients(self.config.grad_clip)

    def step(self, step: int, num_steps: int) -> float:
        """Takes the update of 0-based `step`; returns its learning rate."""
        lr = learning_rate(step, self.config, num_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.num_updates += 1
        self.weights.clear_gradients()
        self.weights.publish()
        if self.average is not None:
            self.average.update(self.weights.masters)
        return lr

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside, its weights require no gradient: others may differentiate through its modules."""
        for parameter in self.weights.parameters:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in self.weights.parameters:
                parameter.requires_grad_(True)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, its modules are whole on every rank, hold averaged weights, and are in evaluation mode."""
        assert self.average is not None
        for module in self.weights.modules.values():
            module.eval()
        with self.weights.replaced_by(self.average.averages), torch.no_grad():
            yield
        self.train()

    def export(self) -> dict[str, dict[str, Tensor]]:
        """{module: state} with averaged weights; see TrainedWeights.export."""
        return self.weights.export(None if self.average is None else self.average.averages)

    def tensors(self) -> dict[str, Tensor]:
        """All of its state, copied to host memory, sharded tensors as such."""
        parts = self._parts(moments(self.optimizer, self.weights.masters))
        return {key: self.weights.global_tensor(name, part.detach().to("cpu", copy=True)) for key, name, part in parts}

    def empty_tensors(self, num_updates: int) -> dict[str, Tensor]:
        """What to read the checkpoint of a player with so many updates into."""
        stand_in = dict.fromkeys(MOMENTS, self.weights.masters) if num_updates else {}
        return {
            key: self.weights.global_tensor(name, torch.empty_like(part, device="cpu", requires_grad=False))
            for key, name, part in self._parts(stand_in)
        }

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], num_updates: int) -> None:
        """Takes what `tensors` gave after `num_updates` updates; what was under way is forgotten."""
        self.weights.clear_gradients()
        self.num_updates = num_updates
        of_kind: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            if key.startswith(self.prefix):
                kind, name = key.removeprefix(self.prefix).split(".", 1)
                of_kind.setdefault(kind, {})[name] = local(tensor)
        self.weights.load_state_dict(of_kind["weights"])
        if self.average is not None:
            for average, name in zip(self.average.averages, self.weights.names, strict=True):
                average.copy_(of_kind["ema"][name])
        loaded = {kind: [of_kind[kind][name] for name in self.weights.names] for kind in MOMENTS if kind in of_kind}
        set_moments(self.optimizer, loaded, num_updates)

    def shapes(self, num_updates: int) -> dict[str, tuple[int, ...]]:
        """Of everything that such a checkpoint must hold, whole."""
        return {key: tuple(tensor.shape) for key, tensor in self.empty_tensors(num_updates).items()}

    def _parts(self, of_moments: Mapping[str, list[Tensor]]) -> Iterator[tuple[str, str, Tensor]]:
        """(key in a checkpoint, name of the weight, this rank's part) of everything."""
        lists = dict(of_moments) if self.average is None else {"ema": self.average.averages} | dict(of_moments)
        of_kind = {kind: dict(zip(self.weights.names, values, strict=True)) for kind, values in lists.items()}
        for kind, parts in ({"weights": self.weights.state_dict()} | of_kind).items():
            for name, part in parts.items():
                yield f"{self.prefix}{kind}.{name}", name, part
