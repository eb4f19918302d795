"""Replays `sequence-parallel-comm`: what the ranks of Open-Sora-Plan's hw branch exchange, among as many processes.

There each rank brings a sample of its own, and gets its share of the frames, of the images and of the images' texts of
all samples; temporal attention trades frames for heads and back. Elements are moved and none is changed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from opensora_kernels import gather_sequence, sequence_all_to_all
from tests.oracles.registry import Case, Check, adapter
from tests.sequence_parallel.worlds import PASSED, World, run

CASE = "case.txt"


@adapter("sequence-parallel-comm")
def exchanges(case: Case) -> Iterator[Check]:
    num_ranks = case.config["world"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / CASE).write_text(str(case.path))
        (outcomes,) = run(num_ranks, [exchange_as_recorded], folder).values()
        assert outcomes == [PASSED] * num_ranks, "\n".join(outcomes)
        found = {f"r{rank}.{key}": x for rank in range(num_ranks) for key, x in load_file(_file(folder, rank)).items()}
    assert found.keys() == case.outputs.keys()
    for key, expected in sorted(case.outputs.items()):
        yield Check(key, found[key], expected, exact=True)


def exchange_as_recorded(world: World) -> None:
    case = Case(Path((world.folder / CASE).read_text()))
    prefix = f"r{world.rank}."
    inputs = {key.removeprefix(prefix): x for key, x in case.inputs.items() if key.startswith(prefix)}
    num_frames, num_ranks = case.config["frames"], world.num_ranks

    def spread(x: Tensor, dim: int) -> Tensor:
        """This rank's share along `dim` of the samples of all ranks."""
        return sequence_all_to_all(x, scatter=dim, gather=0, length=num_ranks, group=world.group)

    def spread_frames(x: Tensor, dim: int) -> Tensor:
        parts = x.tensor_split([num_frames], dim)
        return torch.cat([spread(part, dim) for part in parts], dim)

    def spread_texts(x: Tensor) -> Tensor:
        """The clips' texts are for all ranks, those of images for the rank that has the image."""
        of_clips = gather_sequence(x[:, :1], dim=0, length=num_ranks, group=world.group)
        return torch.cat([of_clips, spread(x[:, 1:], 1)], dim=1)

    heads = inputs["sbh_in"]
    whole = sequence_all_to_all(heads, scatter=1, gather=0, length=len(heads) * num_ranks, group=world.group)
    hidden_states = spread_frames(inputs["hidden_states"], 2)
    found = {
        "hidden_states": hidden_states,
        "attention_mask": spread_frames(inputs["attention_mask"], 1),
        "encoder_hidden_states": spread_texts(inputs["encoder_hidden_states"]),
        "encoder_attention_mask": spread_texts(inputs["encoder_attention_mask"]),
        "use_image_num_out": torch.tensor(hidden_states.shape[2] - num_frames // num_ranks),
        "sbh_gather_seq": whole,
        "sbh_back": sequence_all_to_all(whole, scatter=0, gather=1, length=heads.shape[1], group=world.group),
    }
    save_file({key: x.contiguous() for key, x in found.items()}, _file(world.folder, world.rank))


def _file(folder: Path, rank: int) -> Path:
    return folder / f"found{rank}.safetensors"
