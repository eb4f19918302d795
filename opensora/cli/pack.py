"""`opensora pack`: turn finished training runs into a model folder small enough to ship."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opensora.cli import CommandError
from opensora.cli.options import Parser

NUM_RECORDED_LOSSES = 20


def run(arguments: Sequence[str]) -> int:
    parser = Parser(
        "pack",
        "Write OUT/{vae,transformer,text_encoder} in bf16 with recipe.json: how each was trained, on what, its losses.",
    )
    parser.add_argument("out", type=Path, help="the folder to write, e.g. opensora/assets/tiny")
    parser.add_argument(
        "--vae", type=Path, nargs="+", required=True, help="run folders of train-vae, first stage first"
    )
    parser.add_argument(
        "--transformer", type=Path, nargs="+", required=True, help="run folders of train, first stage first"
    )
    options = parser.parse(arguments)

    import torch

    from opensora.checkpoints import load_model, save_model
    from opensora.config import STDiT3Config, VideoVAEConfig
    from opensora.models.stdit3 import STDiT3
    from opensora.text.t5 import TextEncoder
    from opensora.vae import VideoVAE

    recipes = {part: [_stage(Path(run)) for run in options[part]] for part in ("vae", "transformer")}
    out, vae_run, flow_run = Path(options["out"]), Path(options["vae"][-1]), Path(options["transformer"][-1])
    vae = load_model(vae_run / "model" / "vae", VideoVAE, VideoVAEConfig)
    transformer = load_model(flow_run / "model" / "transformer", STDiT3, STDiT3Config)
    save_model(out / "vae", vae, vae.config, dtype=torch.bfloat16)
    save_model(out / "transformer", transformer, transformer.config, dtype=torch.bfloat16)
    trained_text = flow_run / "model" / "text_encoder"
    if trained_text.exists():
        length = transformer.config.model_max_length
        encoder = TextEncoder.from_pretrained(trained_text, model_max_length=length, dtype=torch.bfloat16)
        encoder.save_pretrained(out / "text_encoder")
    (out / "recipe.json").write_text(json.dumps(recipes, indent=1) + "\n")
    for file in sorted(path for path in out.rglob("*") if path.is_file()):
        print(f"{file.stat().st_size:>10}  {file}")
    return 0


def _stage(run: Path) -> dict[str, Any]:
    """Configuration, data, seed, steps and losses of one run folder."""
    from opensora.training.records import read_losses

    checkpoints = sorted((run / "checkpoints").glob("step-*/state.json"))
    if not checkpoints:
        raise CommandError(f"pack: {run} must be the output folder of a training run, but has no checkpoint")
    state = json.loads(checkpoints[-1].read_text())
    config = state["config"]
    rows = [row for row in read_losses(run) if int(row["step"]) <= state["step"]]
    window = max(1, len(rows) // NUM_RECORDED_LOSSES)
    means = [rows[start : start + window] for start in range(0, len(rows), window)]
    return {
        "steps": state["step"],
        "seed": config["run"]["seed"],
        "data": _data(Path(config["data"]["manifest"])),
        "batch_size": config["data"]["batch_size"],
        "minutes": round(sum(float(row["seconds"]) for row in rows) / 60, 1),
        "mean_losses": {
            part[-1]["step"]: round(sum(float(row["loss"]) for row in part) / len(part), 5) for part in means
        },
        "config": _without_folders(config),
    }


def _data(manifest: Path) -> dict[str, Any]:
    """Name, number of clips and digest of a manifest; the name alone where the file is gone."""
    if not manifest.exists():
        return {"manifest": manifest.name}
    from opensora.data.manifest import read_manifest

    digest = hashlib.sha256(manifest.read_bytes()).hexdigest()
    return {"manifest": manifest.name, "clips": len(read_manifest(manifest).clips), "sha256": digest}


def _without_folders(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with file names in place of paths, which mean nothing on another machine."""
    return {
        name: _without_folders(value)
        if isinstance(value, dict)
        else Path(value).name
        if isinstance(value, str) and "/" in value
        else value
        for name, value in config.items()
    }
