"""The stages of the releases' VAE trainings, scaled down to minutes on a CPU."""

from __future__ import annotations

from dataclasses import replace

from opensora.config import CausalVideoVAEConfig, TrainVAEConfig, VAEConfig
from opensora.presets import tiny

SIDE = 64
NUM_FRAMES = {9: 5, 17: 9, 25: 9, 33: 17}
LATENT_CHANNELS = 16


def scaled_down(config: TrainVAEConfig) -> TrainVAEConfig:
    """The same stage (what is trained, on which loss, against which discriminator) of a VAE of 1 to 3 M parameters.

    It reads what `opensora make-tiny-data data/tiny` writes, at 64 x 64 pixels and in fewer frames, begins from nothing
    unless told where, and goes without LPIPS, whose weights are not at hand everywhere. The discriminator comes in
    after a third of the steps.
    """
    steps = 300
    optimizer = replace(config.optimizer, lr=1e-3, ema_decay=0.98, warmup_steps=20)
    return replace(
        config,
        vae=_vae(config.vae),
        loss=replace(config.loss, perceptual_weight=0.0),
        adversary=replace(
            config.adversary,
            start=2 * (steps // 3),
            channels=16,
            num_layers=2,
            optimizer=replace(config.adversary.optimizer, lr=1e-3),
        ),
        data=replace(
            config.data,
            manifest=f"{tiny.DATA}/vae_train.csv",
            validation=f"{tiny.DATA}/heldout.csv",
            image_size=(SIDE, SIDE),
            num_frames=NUM_FRAMES[config.data.num_frames],
            batch_size=2,
            num_workers=0,
            cache_in_memory=True,
        ),
        optimizer=optimizer,
        run=replace(
            config.run,
            output=f"{config.run.output}-tiny",
            steps=steps,
            dtype="fp32",
            checkpoint_every=100,
            sample_every=100,
            grad_checkpoint=False,
        ),
        initial_log_variance=-4.0,
        num_statistics_clips=16,
    )


def _vae(config: VAEConfig) -> VAEConfig:
    """A narrow one of the same modules; of the stacked VAE, the embedded model's."""
    if not isinstance(config, CausalVideoVAEConfig):
        return tiny.vae()
    return replace(
        config,
        hidden_size=32,
        hidden_size_mult=(1,) * len(config.hidden_size_mult),
        num_res_blocks=1,
        z_channels=LATENT_CHANNELS,
        embed_dim=LATENT_CHANNELS,
    )
