"""`opensora find-batch-sizes`: a bucket table whose steps take equally long on this machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

from opensora.cli import CommandError
from opensora.cli.options import OrNone, Parser
from opensora.cli.training import StageChoice, choose_stage
from opensora.config import BucketTable, Precision, RunConfig, TrainConfig

GIB = 2**30


def run(arguments: Sequence[str]) -> int:
    choice = choose_stage("find-batch-sizes", arguments, lambda preset: preset.training)
    options = _parser(choice).parse(arguments)
    choice.check(options)
    training = choice.config
    if not options["buckets"]:
        raise CommandError(f"buckets: must be given for {choice.preset.name} {choice.stage}, which has none, got {{}}")

    import torch

    from opensora.bucket_sizes import (
        TrainStep,
        build_transformer,
        find_batch_sizes,
        latent_size_of,
        training_state_bytes,
    )
    from opensora.parallel import DTYPES, resolve_device
    from opensora.schedulers import build

    device = resolve_device(options["device"])
    transformer = build_transformer(
        training, dtype=DTYPES[options["dtype"]], device=device, grad_checkpoint=options["grad_checkpoint"]
    )
    memory = options["memory_gib"] and int(options["memory_gib"] * GIB)
    if memory is None and device.type == "cuda":
        memory = int(0.95 * torch.cuda.get_device_properties(device).total_memory)
    if memory is not None:
        memory -= training_state_bytes(transformer, options["shards"])
    training = choice.complete(training)
    step = TrainStep(
        transformer, build(training.scheduler), latent_size_of(training.vae, training.vae_kind), options["repeats"]
    )
    table, _ = find_batch_sizes(
        options["buckets"],
        step,
        target_seconds=options["target_seconds"],
        memory_bytes=memory,
        max_batch_size=options["max_batch_size"],
        report=_print_found,
    )
    print(f"--data.buckets '{json.dumps(table)}'")
    if options["output"] is not None:
        _write(Path(options["output"]), table)
    return 0


def _parser(choice: StageChoice[TrainConfig]) -> Parser:
    parser = Parser(
        "find-batch-sizes",
        "Time forward and backward of a stage's transformer in every bucket at growing batch sizes, and print the "
        "table with the batch sizes at which all take equally long.",
    )
    choice.add_options(parser)
    add, run_config = parser.add_argument, choice.config.run
    add("--buckets", type=BucketTable, default=choice.config.data.buckets, help="a table in place of the stage's")
    add("--target-seconds", type=OrNone(float), help="of a step; default: of the slowest bucket at batch 1")
    add("--memory-gib", type=OrNone(float), help="of the accelerator; default: 95 %% of what it has")
    add("--shards", type=int, default=1, help="ranks that share weights' averages and the optimizer's state")
    add("--max-batch-size", type=int, default=512)
    add("--repeats", type=int, default=3, help="timed steps of each size")
    hint = get_type_hints(RunConfig)["grad_checkpoint"]
    add("--grad-checkpoint", type=hint, default=run_config.grad_checkpoint, help="default: the stage's")
    add("--dtype", type=Precision, default=run_config.dtype)
    add("--device", type=str, default="auto", help="auto, cpu, cuda, npu, ...")
    add("--output", "-o", type=OrNone(str), help="a YAML file for --config of `opensora train`")
    return parser


def _print_found(found: Any) -> None:
    memory = f", {found.num_bytes / GIB:.1f} GiB" if found.num_bytes else ""
    size = f"{found.resolution:>6}, {found.num_frames:>3} frames"
    print(f"{size}: batch {found.batch_size:>3}, {found.seconds:.3f} s{memory}, limited by {found.limit}", flush=True)


def _write(path: Path, table: BucketTable) -> None:
    """JSON is YAML, and needs no library."""
    from opensora.data.shards import replacing  # imports torch: not for --help

    content = {
        "data": {"buckets": {name: {str(key): entry for key, entry in row.items()} for name, row in table.items()}}
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
