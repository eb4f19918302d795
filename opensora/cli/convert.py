"""`opensora convert`: a checkpoint in another layout or precision, or as the start of the next model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from opensora import families
from opensora.cli import CommandError
from opensora.cli.options import OrNone, Parser
from opensora.config import Precision

if TYPE_CHECKING:
    from opensora.conversion import Checkpoint


def run(arguments: Sequence[str]) -> int:
    options = _parser().parse(arguments)

    from opensora.checkpoints import resolve
    from opensora.conversion import read_checkpoint, write_checkpoint
    from opensora.parallel import DTYPES

    location = resolve(options["input"])
    config = _read_json(options["config"]) if options["config"] else None
    if options["adapt_to"] is not None:
        checkpoint = _adapted(location, options, config or {})
    else:
        checkpoint = read_checkpoint(location, family=options["family"], config=config, prefer_ema=options["ema"])
        under = f", under {checkpoint.entry!r}" if checkpoint.entry else ""
        print(f"{location}{under}: {checkpoint.family}, {len(checkpoint.state)} tensors")
    dtype = DTYPES[options["dtype"]] if options["dtype"] is not None else None
    for path in write_checkpoint(checkpoint, Path(options["output"]), layout=options["layout"], dtype=dtype):
        print(f"{path.stat().st_size:>14,}  {path}")
    return 0


def _parser() -> Parser:
    parser = Parser("convert", "Read a checkpoint in any layout, check that it is whole, and write it in another.")
    add = parser.add_argument
    add("input", type=str, help='folder, file or hub id ("owner/name", or "owner/name:folder" for a part of one)')
    add("output", type=str, help="folder to write, or a .pth file")
    layouts = "ours; released: as its release was; pth: one file of tensors"
    add("--layout", type=Literal["ours", "released", "pth"], default="ours", help=layouts)
    add("--family", type=OrNone(str), help=f"one of {', '.join(families.names())}; default: what its keys say")
    add("--config", type=OrNone(str), help="a config.json in place of the checkpoint's; fields of it with --adapt-to")
    add("--dtype", type=Precision | None, default=None, help="of the weights written; default: as they are")
    add("--ema", action="store_true", help="take averaged weights where the checkpoint has them")
    adapt = "stdit, stdit2 or stdit3: begin that model from this one, with PixArt's images or the model before"
    add("--adapt-to", type=OrNone(str), help=adapt)
    add("--qk-norm", type=bool, default=True, help="of the adapted model; off, its first frame is the source's image")
    return parser


def _read_json(path: str) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text())
    except ValueError as error:
        raise CommandError(f"config: {path} must hold JSON: {error}") from error
    if not isinstance(content, dict):
        raise CommandError(f"config: {path} must hold an object, got {type(content).__name__}")
    return content


def _adapted(location: Path, options: dict[str, Any], changes: dict[str, Any]) -> Checkpoint:
    """A new model that starts from the weights in `location`; what is new in it is drawn from seed 0."""
    import torch

    from opensora.adaptation import MODELS, adapt, adapted_config
    from opensora.conversion import Checkpoint, read_state

    target = families.find(options["adapt_to"])
    state = read_state(location, prefer_ema=options["ema"])
    if target.name in ("STDiT2", "STDiT3"):
        changes = {"qk_norm": options["qk_norm"], **changes}
    config = adapted_config({name: tuple(tensor.shape) for name, tensor in state.items()}, target.name, **changes)
    torch.manual_seed(0)
    model = MODELS[target.name](config)
    print(adapt(state, model))
    return Checkpoint(target, model.state_dict(), config, location)
