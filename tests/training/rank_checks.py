"""What must hold on each of several ranks; each function runs in all processes of a world."""

from __future__ import annotations

import math
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from opensora.config import OptimizerConfig, ParallelConfig
from opensora.models import STDiT3
from opensora.parallel import ParallelContext
from opensora.training import Adversary, TrainedWeights
from opensora.training.checkpoint import read_tensors
from opensora.training.records import read_losses
from tests.sequence_parallel.worlds import World
from tests.training import recipe_rank_checks, vae_rank_checks
from tests.training.flow_run import NUM_STEPS, train_flow

CPU = torch.device("cpu")
# How many batches a step of `whole_run` takes: as one process, or R ranks with 4 / R micro-batches each.
NUM_MICRO_BATCHES = 4
LAST = f"step-{NUM_STEPS:08d}"


def whole_run(folder: Path) -> None:
    """The answer to all others: one process."""
    context = ParallelContext.single_process("cpu")
    train_flow(folder / "whole", context, accumulation_steps=NUM_MICRO_BATCHES)


def context_of(sharding: str = "full", **options: object) -> ParallelContext:
    return ParallelContext.of_world(ParallelConfig(sharding=sharding, **options), CPU)


def numbers(output: Path) -> list[dict[str, float]]:
    return [
        {name: float(value) for name, value in row.items() if not name.endswith("seconds")}
        for row in read_losses(output)
    ]


def assert_equal_runs(one: Path, other: Path) -> None:
    """Losses, gradient norms, weights, averages and moments agree within 1e-5, as fp32 sums in another order do."""
    rows, expected = numbers(one), numbers(other)
    assert len(rows) == len(expected) == NUM_STEPS
    for row, of_whole in zip(rows, expected, strict=True):
        assert row == pytest.approx(of_whole, rel=1e-5, abs=1e-5)
    checkpoints = [output / "checkpoints" / LAST for output in (one, other)]
    tensors, expected_tensors = (read_tensors(path) for path in checkpoints)
    assert tensors.keys() == expected_tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(
            tensor, expected_tensors[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    models, expected_models = (load_file(output / "model" / "flow.safetensors") for output in (one, other))
    assert models.keys() == expected_models.keys()
    for name, tensor in models.items():
        torch.testing.assert_close(tensor, expected_models[name], rtol=1e-5, atol=1e-5)


def sharded_training_equals_one_process(world: World) -> None:
    train_flow(world.folder / "full", context_of(), accumulation_steps=NUM_MICRO_BATCHES // world.num_ranks)
    if world.rank == 0:
        assert_equal_runs(world.folder / "full", world.folder / "whole")


def training_with_whole_copies_equals_one_process(world: World) -> None:
    context = context_of("none")
    train_flow(world.folder / "none", context, accumulation_steps=NUM_MICRO_BATCHES // world.num_ranks)
    if world.rank == 0:
        assert_equal_runs(world.folder / "none", world.folder / "whole")


def a_ring_of_ranks_that_exchange_heads_equals_one_process(world: World) -> None:
    """Ranks that read other batches beside such that exchange heads: see recipe_rank_checks."""
    context = context_of(ulysses=2, ring=world.num_ranks // 2)
    train_flow(world.folder / "ring", context, accumulation_steps=NUM_MICRO_BATCHES)
    if world.rank == 0:
        assert_equal_runs(world.folder / "ring", world.folder / "whole")


def a_run_is_left_half_done(world: World) -> None:
    """For `a_run_of_more_ranks_goes_on`, in a world of fewer."""
    train_flow(world.folder / "half", context_of(), accumulation_steps=1, steps=2)


def a_run_of_more_ranks_goes_on(world: World) -> None:
    output = world.folder / "half"
    accumulation_steps = NUM_MICRO_BATCHES // world.num_ranks
    train_flow(output, context_of("none"), accumulation_steps=accumulation_steps, steps=3, resume=True)
    train_flow(output, context_of(), accumulation_steps=accumulation_steps, resume=True)
    if world.rank == 0:
        assert_equal_runs(output, world.folder / "whole")


def the_mesh_is_data_by_ring_by_ulysses(world: World) -> None:
    context = context_of(ring=world.num_ranks // 2, ulysses=2)
    assert context.data_group is None
    assert context.data_rank == 0
    assert context.data_world_size == 1
    assert dist.get_process_group_ranks(context.sequence.group) == list(range(world.num_ranks))
    first = world.rank // 2 * 2
    assert dist.get_process_group_ranks(context.sequence.ulysses) == [first, first + 1]
    context = context_of(ulysses=2)
    assert (context.data_rank, context.data_world_size) == (world.rank // 2, world.num_ranks // 2)
    with pytest.raises(ValueError, match="ulysses x ring must divide the number of processes, 4, got 3 x 1"):
        context_of(ulysses=3)


def ranks_of_one_sequence_draw_alike(world: World) -> None:
    drawn: list[float] = []
    train_flow(
        world.folder / "alike",
        context_of(ulysses=2),
        before_loss=lambda step: drawn.append(float(torch.rand(()))),
        steps=2,
    )
    everyones: list[list[float]] = [[]] * world.num_ranks
    dist.all_gather_object(everyones, drawn)
    assert everyones[0] == everyones[1] != everyones[2] == everyones[3]


def bf16_shards_train_and_export_fp32(world: World) -> None:
    context = ParallelContext.of_world(ParallelConfig(), CPU, dtype=torch.bfloat16)
    result = train_flow(world.folder / "bf16", context, dtype="bf16")
    rows, expected = (numbers(world.folder / name) for name in ("bf16", "whole"))
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], rel=0.05)
    saved = read_tensors(result.checkpoint)
    trained = [name.replace("ema.", "weights.") for name in saved if name.startswith("ema.")]
    assert {saved[name].dtype for name in trained} == {torch.float32}
    with pytest.raises(
        ValueError, match=r"run\.dtype must be what sharded modules compute in, torch.float32, got torch.bf"
    ):
        train_flow(world.folder / "mixed-up", context_of(), dtype="bf16")


def samples_and_validation_see_averaged_weights_everywhere(world: World) -> None:
    seen: list[tuple[Path, int]] = []

    def sample(folder: Path, step: int) -> dict[str, float]:
        (folder / f"{step}.txt").write_text("sample")
        seen.append((folder, step))
        return {"sample": 1.0}

    def validate(model: STDiT3, step: int) -> dict[str, float]:
        # more than forward, on one rank alone: all weights are there
        if world.rank == step % world.num_ranks:
            text = model.prepare_text(torch.ones(1, 1, 4, 6))
            sizes = {"height": 32.0, "width": 32.0, "fps": torch.full((1,), 32.0)}
            output = model(torch.ones(1, 4, 3, 4, 4), torch.ones(1), text, **sizes)
            assert torch.isfinite(output).all()
            assert not model.training
        return {"checked": float(step)}

    output = world.folder / "shown"
    train_flow(
        output, context_of(), accumulation_steps=1, sample=sample, validate=validate, sample_every=2, validate_every=1
    )
    assert [step for _, step in seen] == [2, 4]
    if world.rank == 0:
        assert sorted(path.name for path in (output / "samples").iterdir()) == ["2.txt", "4.txt"]
        assert_equal_runs(output, world.folder / "whole")


def a_bad_loss_of_one_rank_is_skipped_by_all(world: World) -> None:
    def poison(step: int) -> float:
        return float("nan") if step == 2 and world.rank == world.num_ranks - 1 else 1.0

    result = train_flow(world.folder / "skipped", context_of(), before_loss=poison, on_bad_loss="skip")
    assert result.step == NUM_STEPS
    assert all(torch.isfinite(tensor).all() for tensor in read_tensors(result.checkpoint).values())
    if world.rank == 0:
        losses = [row["loss"] for row in numbers(world.folder / "skipped")]
        assert [math.isfinite(loss) for loss in losses] == [True, True, False, True]


def a_signal_to_one_rank_stops_all_after_the_same_step(world: World) -> None:
    def interrupt(step: int) -> None:
        if step == 1 and world.rank == world.num_ranks - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    output = world.folder / "stopped"
    result = train_flow(output, context_of(), before_loss=interrupt, checkpoint_every=0)
    assert (result.step, result.was_stopped) == (2, True)
    train_flow(output, context_of(), resume=True)
    if world.rank == 0:
        assert_equal_runs(output, world.folder / "whole")


def an_adversary_learns_alike_on_all_ranks(world: World) -> None:
    def adversary() -> Adversary:
        torch.manual_seed(5)
        critic = nn.Linear(3, 1)
        context.wrap(critic, is_sharded=False)
        optimizer = OptimizerConfig(lr=1e-2, grad_clip=0.1)

        def loss(batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
            return critic(batch["latents"].mean((0, 1, 3, 4))).square().mean(), {}

        return Adversary({"critic": critic}, loss, optimizer)

    outputs = [world.folder / name for name in ("against", "against-whole")]
    context = context_of()
    train_flow(outputs[0], context, adversary=adversary)
    if world.rank == 0:
        context = ParallelContext.single_process("cpu")
        train_flow(outputs[1], context, adversary=adversary, accumulation_steps=NUM_MICRO_BATCHES)
        assert_equal_runs(*outputs)
        saved = read_tensors(outputs[0] / "checkpoints" / LAST)
        assert "adversary.exp_avg.critic.weight" in saved
        assert "adversary.ema.critic.weight" not in saved
    dist.barrier()


@dataclass(frozen=True)
class Halves:
    """What `TiedModel` returns."""

    first: Tensor
    rest: list[Tensor]


class TiedModel(nn.Module):
    """Two layers of one weight, and an output in which FSDP sees no tensor by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.second.weight = self.first.weight
        self.last.bias.requires_grad_(False)
        self.unused = nn.Linear(1, 5)

    def forward(self, x: Tensor) -> Halves:
        out = self.last(self.second(self.first(x).tanh()))
        return Halves(out[:, :1], [out[:, 1:]])


def gradients_reach_tied_weights_through_a_dataclass(world: World) -> None:
    """Also with gradients by themselves on the way, as an adversary's weight is found."""

    def model() -> TiedModel:
        torch.manual_seed(1)
        return TiedModel()

    def backward(model: TiedModel, x: Tensor) -> Tensor:
        output = model(x)
        loss = output.first.square().mean() + output.rest[0].sum()
        (by_itself,) = torch.autograd.grad(loss, model.last.weight, retain_graph=True)
        loss.backward()
        return by_itself

    context = context_of()
    x = torch.randn(world.num_ranks, 2, 3, generator=torch.Generator().manual_seed(2))
    whole, wrapped = model(), context.wrap(model())
    weights = TrainedWeights({"tied": wrapped}, torch.float32, context)
    for micro_batch in range(2):
        by_itself = [backward(whole, part * (micro_batch + 1)) for part in x]
        weights.set_gradient_sync(micro_batch == 1)
        found = backward(wrapped, x[world.rank] * (micro_batch + 1))
        torch.testing.assert_close(found, by_itself[world.rank])
        weights.collect_gradients(is_last=micro_batch == 1)
    assert weights.names == ["tied.first.weight", "tied.first.bias", "tied.second.bias", "tied.last.weight",
                             "tied.unused.weight", "tied.unused.bias"]  # fmt: skip
    of_whole = dict(whole.named_parameters())
    for name, master in zip(weights.names, weights.masters, strict=True):
        gradient = weights.global_tensor(name, master.grad).full_tensor()
        expected = of_whole[name.removeprefix("tied.")].grad
        expected = torch.zeros_like(gradient) if expected is None else expected / world.num_ranks
        torch.testing.assert_close(gradient, expected)


def a_killed_rank_ends_the_others_with_an_error(world: World) -> None:
    def die(step: int) -> None:
        if step == 3 and world.rank == world.num_ranks - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    context = context_of(timeout=20.0)
    start = time.monotonic()
    with pytest.raises(ConnectionError, match=f"rank {world.rank} of {world.num_ranks} lost touch .* after step 3"):
        train_flow(world.folder / "killed", context, before_loss=die, checkpoint_every=2)
    assert time.monotonic() - start < 20


IN_FOUR = [
    sharded_training_equals_one_process,
    training_with_whole_copies_equals_one_process,
    a_ring_of_ranks_that_exchange_heads_equals_one_process,
    the_mesh_is_data_by_ring_by_ulysses,
    ranks_of_one_sequence_draw_alike,
    bf16_shards_train_and_export_fp32,
    samples_and_validation_see_averaged_weights_everywhere,
    a_bad_loss_of_one_rank_is_skipped_by_all,
    a_signal_to_one_rank_stops_all_after_the_same_step,
    an_adversary_learns_alike_on_all_ranks,
    gradients_reach_tied_weights_through_a_dataclass,
    a_run_is_left_half_done,
    *recipe_rank_checks.CHECKS,
    a_killed_rank_ends_the_others_with_an_error,
]
IN_TWO = [
    sharded_training_equals_one_process,
    a_run_of_more_ranks_goes_on,
    *vae_rank_checks.CHECKS,
]
