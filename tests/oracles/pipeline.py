"""Replays the `pipeline` case: Open-Sora-Plan 1.1's sampling as a whole, with a stub in place of the text encoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from opensora.config import DiffusersSamplerConfig, SampleConfig
from opensora.sampler import Sampler
from tests.oracles.causal_video_vae import tiny_vae
from tests.oracles.latte import tiny_transformer
from tests.oracles.registry import Case, Check, adapter


@adapter("pipeline")
@torch.no_grad()
def pipeline(case: Case) -> Iterator[Check]:
    transformer = tiny_transformer(Case(case.path.parent / case.config["transformer"]))
    vae = tiny_vae(Case(case.path.parent / case.config["vae"]))
    encoder = StubTextEncoder(case.inputs["table"], transformer.config.model_max_length)
    sampler = Sampler(vae, transformer, encoder)
    for name, run in case.config["runs"].items():
        noise = torch.randn(run["latent_shape"], generator=torch.Generator().manual_seed(3959))
        steps, scale = run["num_inference_steps"], run["guidance_scale"]
        scheduler = DiffusersSamplerConfig(run["scheduler"], num_sampling_steps=steps, cfg_scale=scale)
        config = SampleConfig(
            num_frames=str(run["num_frames"]),
            resolution=None,
            aspect_ratio=None,
            image_size=(run["height"], run["width"]),
            align=None,
            aes=None,
            negative_prompt=run["negative_prompt"],
            cut_negative=True,
            seed=3959,
        )
        plan = sampler.plan([run["prompt"]], config, scheduler=scheduler)
        (request,) = plan.requests
        embeddings, mask = encoder.encode([request.texts[0], request.negative])
        length = int(mask[0].sum())
        for part, embedding in zip(("prompt", "negative"), embeddings[:, 0, :length], strict=True):
            yield Check(f"{name}.{part}_embeds", embedding[None], case.outputs[f"{name}.{part}_embeds"], max_abs=1e-5)
        recorder = Recorder(vae)
        sampler.models = sampler.models.__class__(recorder, transformer, sampler.workplace, torch.float32)
        (clip,) = sampler.run(plan)
        assert torch.equal(noise, torch.randn(noise.shape, generator=torch.Generator().manual_seed(clip.seed)))
        expected = case.outputs[f"{name}.latents"]
        # 3e-5 on one kind of CPU and 1.02e-4 on another, by DDIM, whose last steps magnify how they round.
        yield Check(f"{name}.latents", recorder.latents, expected, max_abs=2e-4 * float(expected.abs().max()))
        if f"{name}.video_uint8" in case.outputs:
            frames = clip.frames.permute(0, 2, 3, 1)[None].float()
            yield Check(f"{name}.video_uint8", frames, case.outputs[f"{name}.video_uint8"].float(), max_abs=1.0)


class StubTextEncoder:
    """Words to rows of a table, as the case's config describes it."""

    def __init__(self, table: Tensor, model_max_length: int) -> None:
        self.table, self.model_max_length, self.output_dim = table, model_max_length, table.shape[1]

    def eval(self) -> StubTextEncoder:
        return self

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        ids = torch.zeros(len(captions), self.model_max_length, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, caption in enumerate(captions):
            words = [sum(map(ord, word)) % 95 + 2 for word in caption.split()] + [1]
            ids[row, : len(words)], mask[row, : len(words)] = torch.tensor(words), 1
        position = torch.arange(self.model_max_length).sin()[None, :, None]
        return (self.table[ids] + 0.01 * position * mask.sum(dim=1)[:, None, None])[:, None], mask


class Recorder:
    """A VAE that remembers what it was asked to decode."""

    def __init__(self, vae: torch.nn.Module) -> None:
        self._vae = vae
        self.latents: Tensor | None = None

    def decode(self, z: Tensor, num_frames: int) -> Tensor:
        self.latents = z
        return self._vae.decode(z, num_frames)

    def __getattr__(self, name: str):
        return getattr(self._vae, name)
