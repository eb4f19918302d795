"""Batch sizes for steps of equal length: of costs that are known, and of a small model that runs."""

from __future__ import annotations

import json
import math

import pytest
import torch

from opensora import presets
from opensora.bucket_sizes import Cost, build_transformer, find_batch_sizes, largest_size, training_state_bytes
from opensora.cli import main
from opensora.presets.scaling import scaled

TABLE = {
    "144p": {1: (1.0, 4), 51: ((1.0, 0.3), 1), 102: (0.5, 1)},
    "480p": {1: (0.5, 1), 51: (0.0, 0)},
}


class Machine:
    """Seconds and bytes as lines over the pixels of a batch; out of memory above `memory`."""

    def __init__(self, *, fixed: float = 0.2, memory: float = math.inf) -> None:
        self.fixed, self.memory = fixed, memory
        self.calls: list[tuple[tuple[int, int, int], int]] = []

    def __call__(self, size: tuple[int, int, int], batch_size: int) -> Cost:
        self.calls.append((size, batch_size))
        pixels = math.prod(size) * batch_size
        num_bytes = 1_000_000 + 40 * pixels
        if num_bytes > self.memory:
            raise torch.OutOfMemoryError("out of memory")
        return Cost(self.fixed + pixels * 1e-6, num_bytes)


def batch_sizes(table) -> dict[tuple[str, int], int]:
    return {(name, frames): entry[1] for name, row in table.items() for frames, entry in row.items()}


@pytest.mark.parametrize("fixed", [0.0, 0.2, 3.0])
def test_every_bucket_takes_as_long_as_the_slowest_at_batch_one(fixed):
    machine = Machine(fixed=fixed)
    table, found = find_batch_sizes(TABLE, machine)
    target = fixed + math.prod(largest_size("144p", 102)) * 1e-6
    for each in found:
        seconds = [fixed + math.prod(each.size) * 1e-6 * (each.batch_size + more) for more in (0, 1)]
        assert seconds[0] <= 1.03 * target < seconds[1]
        assert each.seconds == pytest.approx(seconds[0])
    assert batch_sizes(table)[("144p", 102)] == 1
    assert len(machine.calls) < 40  # no search through all sizes


def test_the_table_keeps_its_probabilities_and_what_keeps_no_clips():
    table, _ = find_batch_sizes(TABLE, Machine())
    kept = {name: {frames: entry[0] for frames, entry in row.items()} for name, row in table.items()}
    assert kept == {name: {frames: entry[0] for frames, entry in row.items()} for name, row in TABLE.items()}
    assert table["480p"][51] == (0.0, 0)


@pytest.mark.parametrize("is_told", [True, False])
def test_memory_limits_a_batch_where_it_is_known_and_where_it_runs_out(is_told):
    memory = 1_000_000 + 40 * math.prod(largest_size("144p", 51)) * 3.5
    machine = Machine(memory=math.inf if is_told else memory)
    options = {"target_seconds": 1e6, "memory_bytes": int(memory) if is_told else None}
    table, found = find_batch_sizes({"144p": {51: (1.0, 1)}}, machine, **options)
    assert batch_sizes(table) == {("144p", 51): 3}
    assert found[0].limit == "memory"
    assert max(batch for _, batch in machine.calls) <= 4


def test_other_limits_hold_and_are_named():
    table, found = find_batch_sizes({"144p": {1: (1.0, 1)}}, Machine(), target_seconds=1e6, max_batch_size=12)
    assert (batch_sizes(table)[("144p", 1)], found[0].limit) == (12, "largest batch")
    table, found = find_batch_sizes(TABLE, Machine(), target_seconds=1e-6)
    assert {each.batch_size for each in found} == {1}
    assert {each.limit for each in found} == {"time"}


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        ({"144p": {51: (0.0, 0)}}, {}, "some bucket must keep clips"),
        (TABLE, {"max_batch_size": 0}, "must be above 0, got 0 and None"),
        (TABLE, {"target_seconds": 0.0}, "must be above 0, got 512 and 0.0"),
        (TABLE, {"memory_bytes": 2_000_000}, "memory_bytes must hold a clip of"),
        ({"145p": {1: (1.0, 1)}}, {}, "resolution: must be one of"),
    ],
)
def test_wrong_limits_are_refused(table, options, message):
    with pytest.raises(ValueError, match=message):
        find_batch_sizes(table, Machine(), **options)


def test_a_clip_that_does_not_fit_at_all_is_an_error():
    with pytest.raises(torch.OutOfMemoryError):
        find_batch_sizes(TABLE, Machine(memory=2_000_000))


def test_the_command_measures_a_small_model_and_training_takes_the_table(tmp_path, capsys, monkeypatch):
    torch.set_num_threads(1)
    buckets = json.dumps({"144p": {"1": [1.0, 1], "17": [[1.0, 0.5], 1]}})
    output = tmp_path / "buckets.yaml"
    arguments = ["find-batch-sizes", "--preset", "tiny", "--buckets", buckets, "--max-batch-size", "2"]
    assert main([*arguments, "--repeats", "1", "--dtype", "fp32", "--device", "cpu", "-o", str(output)]) == 0
    *lines, printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0].split() for line in lines] == [["144p,", f"{n}", "frames"] for n in (1, 17)]
    table = printed.removeprefix("--data.buckets '").removesuffix("'")
    seen = []
    monkeypatch.setattr("opensora.cli.train._train", lambda config, resume, context: seen.append(config) or 1 / 0)
    for given in (["--data.buckets", table], ["--config", str(output)]):
        with pytest.raises(ZeroDivisionError):
            main(["train", "--preset", "open-sora-v1.2", *given])
    assert seen[0].data.buckets == seen[1].data.buckets
    assert seen[0].data.buckets["144p"][1][0] == 1.0
    assert seen[0].data.buckets["144p"][17][0] == (1.0, 0.5)
    assert seen[0].data.buckets["144p"][17][1] == 1


def test_what_is_frozen_has_no_gradient_and_no_state():
    stages = presets.get("open-sora-v1.2").training
    options = {"dtype": torch.float32, "device": torch.device("cpu"), "grad_checkpoint": "none"}
    images, temporal = (
        build_transformer(scaled(stages[name], "tiny"), **options) for name in ("adapt-1-images", "adapt-8-video")
    )
    assert not any(p.requires_grad for p in images.temporal_blocks.parameters())
    for model in (images, temporal):
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert training_state_bytes(model) == 16 * trained < 16 * sum(p.numel() for p in model.parameters())


def test_the_command_refuses_presets_without_buckets_and_of_one_size(capsys):
    assert main(["find-batch-sizes", "--preset", "tiny"]) == 2
    assert "buckets: must be given for tiny uniform" in capsys.readouterr().err
    arguments = ["--buckets", '{"144p": {"1": [1.0, 1]}}', "--device", "cpu"]
    assert main(["find-batch-sizes", "--preset", "open-sora-plan-v1.1", *arguments]) == 2
    assert "transformer must take clips of any size, got LatteT2VConfig" in capsys.readouterr().err
    assert presets.get("tiny").training  # a preset that trains, on clips of one size
