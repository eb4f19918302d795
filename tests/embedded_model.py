"""How good the embedded model is, measured from pixels: `python -m tests.embedded_model [--pairs 64]`.

Prompts are followed: the colour and direction of a generated clip, read off its pixels by `measure_clip`, are those of
its prompt. Clips survive the VAE: PSNR on frames of `carphone`, which no training saw, and on training clips.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from opensora.data.manifest import read_manifest
from opensora.data.reading import read_frames
from opensora.data.shapes import all_shape_clips, measure_clip
from opensora.data.tiny_dataset import make_tiny_dataset
from opensora.presets.tiny import ASSETS
from opensora.sampler import Sampler
from opensora.vae import VideoVAE
from opensora.video import to_uint8, write_contact_sheet

SHEET_PROMPTS = (
    "a red circle moving left",
    "a blue square moving down",
    "a green triangle moving right",
    "a yellow circle moving up",
)

# Training clips are drawn from their own seeds; no noise of training starts from these.
FIRST_SEED = 10_000


@dataclass(frozen=True)
class Outcome:
    prompt: str
    seed: int
    color_is_right: bool
    direction_is_right: bool


def follow_prompts(sampler: Sampler, num_pairs: int, *, batch_size: int = 16) -> Iterator[Outcome]:
    """Generates `num_pairs` prompts, spread over all 72, each with a seed of its own."""
    clips = all_shape_clips()
    # 31 has no factor in common with 72: consecutive prompts differ in colour, shape and direction.
    chosen = [clips[index * 31 % len(clips)] for index in range(num_pairs)]
    for start in range(0, num_pairs, batch_size):
        part = chosen[start : start + batch_size]
        config = sampler.defaults.__class__(**{**vars(sampler.defaults), "batch_size": batch_size})
        generated = sampler.sample([clip.caption for clip in part], config, seed=FIRST_SEED + start)
        for want, have in zip(part, generated, strict=True):
            color, direction = measure_clip(have.frames)
            yield Outcome(want.caption, have.seed, color == want.color, direction == want.direction)


@torch.no_grad()
def reconstruction_psnr(vae: VideoVAE, manifest: Path) -> float:
    """Mean PSNR in dB over the frames of a manifest's clips, decoded from the mean of their latents."""
    scores = []
    for clip in read_manifest(manifest).clips:
        frames_TCHW = read_frames(clip.path)
        x_BCTHW = frames_TCHW.permute(1, 0, 2, 3)[None].to(vae.scale.dtype) / 127.5 - 1
        decoded_TCHW = to_uint8(vae.decode(vae.encode(x_BCTHW, sample_posterior=False), x_BCTHW.shape[2])[0])
        error_T = (decoded_TCHW.double() - frames_TCHW.double()).div(255).square().mean(dim=(1, 2, 3))
        scores += (-10 * torch.log10(error_T.clamp(min=1e-10))).tolist()
    return sum(scores) / len(scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--record", action="store_true", help="write quality.json and sheet.png beside the model")
    options = parser.parse_args()
    sampler = Sampler.from_preset("tiny")
    outcomes = list(follow_prompts(sampler, options.pairs))
    with tempfile.TemporaryDirectory() as folder:
        make_tiny_dataset(folder, num_shapes=36, num_real=84, num_shapes_heldout=0)
        figures = {
            "pairs": len(outcomes),
            "color_right": sum(outcome.color_is_right for outcome in outcomes) / len(outcomes),
            "direction_right": sum(outcome.direction_is_right for outcome in outcomes) / len(outcomes),
            "psnr_heldout_db": round(reconstruction_psnr(sampler.vae, Path(folder) / "heldout.csv"), 2),
            "psnr_training_db": round(reconstruction_psnr(sampler.vae, Path(folder) / "vae_train.csv"), 2),
        }
    for outcome in outcomes:
        if not (outcome.color_is_right and outcome.direction_is_right):
            print(outcome)
    print(json.dumps(figures, indent=1))
    if options.record:
        (ASSETS / "quality.json").write_text(json.dumps(figures, indent=1) + "\n")
        clips = sampler.sample(list(SHEET_PROMPTS), seed=FIRST_SEED)
        write_contact_sheet(ASSETS / "sheet.png", [clip.frames for clip in clips])


if __name__ == "__main__":
    main()
