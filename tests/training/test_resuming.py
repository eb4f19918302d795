"""Which checkpoints a run goes on from, and where a process stands among its peers."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from opensora.cli.training import _hush
from opensora.config import ParallelConfig
from opensora.data.loader import ClipLoader
from opensora.data.samplers import FixedSizeBatchSampler
from opensora.parallel import ParallelContext
from tests.training.toy import toy_model, train


def test_a_checkpoint_of_another_recipe_is_refused_unless_that_is_named(tmp_path: Path):
    train(tmp_path, steps=2, recipe="tiny/uniform")
    with pytest.raises(ValueError, match=r"must be of recipe tiny/motion, got one of tiny/uniform; .*--run.recipe"):
        train(tmp_path, steps=3, resume=True, recipe="tiny/motion")
    assert train(tmp_path, steps=3, resume=True, recipe="tiny/uniform").step == 3


def test_a_checkpoint_of_another_class_of_model_is_refused(tmp_path: Path):
    class OtherModel(nn.Sequential):
        pass

    train(tmp_path, steps=2)
    with pytest.raises(ValueError, match=r"must be of OtherModel \(toy\), got one of Sequential \(toy\)"):
        train(tmp_path, steps=3, resume=True, model=OtherModel(*toy_model()))


def test_a_damaged_checkpoint_is_named(tmp_path: Path):
    checkpoint = train(tmp_path, steps=2).checkpoint
    (file,) = checkpoint.glob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"step-00000002 is damaged .* remove it to go on"):
        train(tmp_path, steps=3, resume=True)
    file.write_bytes(whole)
    state = json.loads((checkpoint / "state.json").read_text())
    del state["watch"]
    (checkpoint / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="must be of this version, got one without watch"):
        train(tmp_path, steps=3, resume=True)


def test_frozen_weights_and_buffers_come_back(tmp_path: Path):
    def model() -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
        model.requires_grad_(False)
        return model

    first, again = model(), model()
    for module in (first, again):
        module[2].requires_grad_(True)
    train(tmp_path, steps=2, model=first, dtype="bf16")
    train(tmp_path, steps=3, model=again, dtype="bf16", resume=True)
    assert torch.equal(first[0].weight, again[0].weight)
    assert again[1].num_batches_tracked == 3


def restarted(num_restarts: int, launch: str = "one") -> ParallelContext:
    return replace(ParallelContext.single_process("cpu"), launch=launch, num_restarts=num_restarts)


def test_only_a_restart_of_the_same_launch_resumes_unasked(tmp_path: Path):
    train(tmp_path, steps=2, context=restarted(0))
    with pytest.raises(ValueError, match="must be a folder without checkpoints unless resuming"):
        train(tmp_path, steps=3, context=restarted(1, launch="another, refused at first"))
    assert train(tmp_path, steps=3, context=restarted(1)).step == 3


def test_what_a_killed_run_was_writing_is_removed(tmp_path: Path):
    train(tmp_path, steps=2)
    for name in (".step-00000003.writing", ".step-00000001.removing"):
        (tmp_path / "checkpoints" / name).mkdir()
    train(tmp_path, steps=3, resume=True)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000002", "step-00000003"]


def test_other_ranks_are_silent_but_for_the_files_that_they_alone_cannot_read(caplog: pytest.LogCaptureFixture):
    loggers = [logging.getLogger(name) for name in ("", "opensora.data.loader", "opensora.data.loader.skipped")]
    levels = [logger.level for logger in loggers]
    try:
        _hush(replace(ParallelContext.single_process("cpu"), rank=1))
        loggers[1].warning("clips.csv: 3 rows left out")
        ClipLoader([], FixedSizeBatchSampler(1, (1, 8, 8), 1))._note([[("clip.mp4", "broken")]])
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    assert [record.getMessage() for record in caplog.records] == [
        "skipped clip.mp4: broken (unreadable files so far: 1)"
    ]


def test_one_process_needs_no_launcher():
    context = ParallelContext.from_environment(ParallelConfig(), "cpu", environment={})
    assert (context.rank, context.world_size, context.launch, context.sequence) == (0, 1, "", None)
    variables = {"WORLD_SIZE": "1", "RANK": "0", "TORCHELASTIC_RUN_ID": "mine", "TORCHELASTIC_RESTART_COUNT": "2"}
    context = ParallelContext.from_environment(ParallelConfig(), "cpu", environment=variables)
    assert (context.world_size, context.launch, context.num_restarts) == (1, "mine", 2)


@pytest.mark.parametrize(
    ("changes", "world_size", "message"),
    [
        ({"ulysses": 2}, "1", "ulysses x ring must divide the number of processes, 1, got 2 x 1"),
        ({"ulysses": 2, "ring": 2}, "6", "ulysses x ring must divide the number of processes, 6, got 2 x 2"),
        ({"ring": 0}, "1", r"parallel.ring must be at least 1, got 0"),
        ({"cpu_offload": True, "sharding": "none"}, "2", "cpu_offload must be false for weights that are not sharded"),
        ({"timeout": 0.0}, "1", r"parallel.timeout must be positive seconds, got 0.0"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(changes: dict, world_size: str, message: str):
    with pytest.raises(ValueError, match=message):
        ParallelContext.from_environment(ParallelConfig(**changes), "cpu", environment={"WORLD_SIZE": world_size})
