"""Training of video VAEs, with or without a discriminator. Axes: B batch, C channels, T frames, H height, W width."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opensora.checkpoints import load_model, load_weights, resolve, save_model
from opensora.config import CausalVideoVAEConfig, TrainVAEConfig, VideoVAEConfig
from opensora.data.datasets import ClipDataset
from opensora.data.loader import make_loader, skipped_logger
from opensora.data.prefetch import Prefetcher
from opensora.metrics import SCORES, scores_of_clip
from opensora.parallel import DTYPES, ParallelContext
from opensora.perceptual import LPIPS
from opensora.training import Adversary, Job, LoaderBatches, TrainingResult, check_options, prepare_process, run_job
from opensora.vae import (
    CausalVideoVAE,
    DiscriminatorLoss,
    GeneratorLoss,
    PatchDiscriminator,
    VAELoss,
    VAEOutput,
    VideoVAE,
    tail_initialize,
)
from opensora.vae.adversarial import at_reconstruction
from opensora.vae.discriminators import AXES
from opensora.vae.initialization import initialize_for_training, set_mix_factors
from opensora.video import to_uint8, write_contact_sheet, write_mp4
from opensora.weight_files import loose_weights, weight_files

NUM_SAMPLE_CLIPS = 4
CLASSES = {VideoVAEConfig: VideoVAE, CausalVideoVAEConfig: CausalVideoVAE}
# Of VGG16, whose features LPIPS compares: four times halved.
MIN_PERCEPTUAL_SIZE = 16


def run_train_vae(
    config: TrainVAEConfig, *, resume: bool = False, context: ParallelContext | None = None
) -> TrainingResult:
    """Trains a VAE on the clips of `config.data`; see `run_job` for what it leaves in `config.run.output`.

    model/vae/ there is a model folder with averaged weights. A stacked VAE gets `scale` and `shift` set to the standard
    deviation and mean of each latent channel over training clips, so that its latents are about N(0, 1); one of
    Open-Sora-Plan keeps its scaling factor.
    Errors: ValueError for a configuration that cannot train; see `run_job` for those met on the way.
    """
    check_options(config.optimizer, config.run)
    for name in ("encoded", "use_image_num"):
        if value := getattr(config.data, name):
            raise ValueError(f"train-vae: data.{name} must not be set, for clips in pixels are needed, got {value!r}")
    context = context or ParallelContext.single_process(config.run.device)
    _check_terms(config, context)
    prepare_process(config.run)
    vae = _build(config, context.device)
    lengths = _lengths(config, vae)
    discriminator = _build_discriminator(config, lengths)
    perceptual = _load_perceptual(config, context.device)
    loader = make_loader(
        config.data,
        seed=config.run.seed,
        rank=context.data_rank,
        num_replicas=context.data_world_size,
        needs_captions=False,
    )
    heldout = None
    if config.data.validation:
        data = replace(config.data, manifest=config.data.validation, batch_size=1)
        heldout = make_loader(data, needs_captions=False).dataset
    vae = context.wrap(vae)
    discriminator = context.wrap(discriminator, is_sharded=False) if discriminator is not None else None
    task = _VAETask(config, vae, discriminator, perceptual, loader.dataset, heldout, context)
    reads_ahead = context.device.type != "cpu" or config.data.num_workers > 0
    job = Job(
        {"vae": vae},
        Prefetcher(loader, context.device) if reads_ahead else LoaderBatches(loader),
        task.loss,
        task.export,
        config,
        task.sample,
        adversary=task.adversary,
        validate=None if heldout is None else task.validate,
    )
    return run_job(job, config.optimizer, config.run, context, resume=resume)


def _check_terms(config: TrainVAEConfig, context: ParallelContext) -> None:
    """What can be told from the configuration alone."""
    in_pixels, kind = config.loss.use_real_rec_loss, config.adversary.kind
    is_stacked = isinstance(config.vae, VideoVAEConfig)
    stacked_only = {
        "freeze_spatial": config.freeze_spatial,
        "spatial_only": config.spatial_only,
        "loss.use_z_rec_loss": config.loss.use_z_rec_loss,
        "loss.use_image_identity_loss": config.loss.use_image_identity_loss,
    }
    for name, value in stacked_only.items():
        if value and not is_stacked:
            raise ValueError(f"train-vae: {name} must be false for a CausalVideoVAE, which has no latents of frames")
    if is_stacked and config.mix_factor is not None:
        raise ValueError("train-vae: mix_factor must be none unless vae is a CausalVideoVAE")
    if config.freeze_spatial and config.initial_vae is None and config.image_vae is None:
        raise ValueError("train-vae: freeze_spatial needs initial_vae or image_vae: nothing has trained the 2-D half")
    if config.image_vae is not None and config.initial_vae is not None:
        raise ValueError("train-vae: weights must start from initial_vae or from image_vae, got both")
    for name, is_on in (("loss.perceptual_weight", config.loss.perceptual_weight), ("adversary.kind", kind != "none")):
        if is_on and not in_pixels:
            raise ValueError(
                f"train-vae: {name} must be off where loss.use_real_rec_loss is: it judges pixels, and this stage "
                "compares latents alone"
            )
    if config.run.checkpointing == "selective":
        raise ValueError("train-vae: run.grad_checkpoint must be full or none for a VAE, got selective")
    if config.parallel.ulysses * config.parallel.ring > 1:
        raise ValueError(
            "train-vae: parallel.ulysses and parallel.ring must be 1, for a VAE has no tokens to cut, got "
            f"{config.parallel.ulysses} and {config.parallel.ring}"
        )
    if config.adversary.use_actnorm and context.world_size > 1:
        raise ValueError(
            "train-vae: adversary.use_actnorm must be false with several ranks, each of which would take its first "
            f"values from a batch of its own, got {context.world_size}"
        )


def _build(config: TrainVAEConfig, device: torch.device) -> VideoVAE | CausalVideoVAE:
    kind = type(config.vae)
    if config.initial_vae is not None:
        vae = load_model(config.initial_vae, CLASSES[kind], kind, dtype=torch.float32)
    else:
        vae = CLASSES[kind](config.vae)
        initialize_for_training(vae, log_variance=config.initial_log_variance)
        if config.image_vae is not None and kind is VideoVAEConfig:
            load_weights(vae.spatial_vae.module, config.image_vae)
        elif config.image_vae is not None:
            tail_initialize(vae, _image_weights(config.image_vae))
    if config.mix_factor is not None and not set_mix_factors(vae, config.mix_factor):
        raise ValueError("train-vae: mix_factor must be none for a VAE whose resampling in time has nothing to train")
    if config.freeze_spatial:
        vae.spatial_vae.requires_grad_(False)
    if config.spatial_only:
        vae.temporal_vae.requires_grad_(False)
    if config.freeze_encoder:
        for part in (vae.spatial_vae.module, vae.temporal_vae) if kind is VideoVAEConfig else (vae,):
            part.encoder.requires_grad_(False)
            part.quant_conv.requires_grad_(False)
    if config.run.checkpointing != "none":
        vae.set_gradient_checkpointing()
    if device.type == "cuda" and kind is VideoVAEConfig:
        # cuDNN's layout. Not on the CPU: there a bf16 step takes 1.60 s so and 1.29 s without (GroupNorm's backward).
        vae.spatial_vae.to(memory_format=torch.channels_last)
    return vae


def _lengths(config: TrainVAEConfig, vae: VideoVAE | CausalVideoVAE) -> tuple[int, ...]:
    """All numbers of frames that a batch may have. Errors: ValueError for one that the VAE cannot take."""
    whole = {n for table in config.data.buckets.values() for n in table} or {config.data.num_frames}
    for num_frames in sorted(whole):
        if vae.padded_frames(num_frames) != num_frames:
            above = vae.padded_frames(num_frames)
            raise ValueError(
                f"train-vae: data.num_frames must be {vae.time_factor} n + 1 for this VAE, got {num_frames}; the "
                f"nearest are {above - vae.time_factor} and {above}"
            )
    shorter = {"none": (), "image": (1,), "random": _valid_lengths(vae, max(whole))}[config.mixed]
    return tuple(sorted({*whole, *shorter}))


def _build_discriminator(config: TrainVAEConfig, lengths: tuple[int, ...]) -> PatchDiscriminator | None:
    """Errors: ValueError for batches that it could not judge."""
    adversary = config.adversary
    if adversary.kind == "none":
        return None
    network = PatchDiscriminator(
        adversary.kind,
        in_channels=config.vae.in_channels if isinstance(config.vae, CausalVideoVAEConfig) else 3,
        channels=adversary.channels,
        num_layers=adversary.num_layers,
        use_actnorm=adversary.use_actnorm,
    )
    size = (*lengths[:1], *(config.data.image_size or ()))[3 - network.num_axes :]
    if adversary.kind != "2d" and lengths == (1,):
        raise ValueError(
            f"train-vae: adversary.kind must be '2d' for single images, got {adversary.kind!r}: a 3-D discriminator "
            "judges motion and needs clips, data.num_frames of 5 or more"
        )
    if any(given < least for given, least in zip(size, network.min_size, strict=False)):
        needed, found = (" x ".join(map(str, axes)) for axes in (network.min_size, size))
        raise ValueError(
            f"train-vae: adversary.kind {adversary.kind!r} with {adversary.num_layers} layers needs at least {needed} "
            f"({AXES[network.num_axes]}), but batches may have {found}; the kind '3d' takes any number of frames"
        )
    return network


def _load_perceptual(config: TrainVAEConfig, device: torch.device) -> LPIPS | None:
    """LPIPS from files on this machine. Errors: ValueError or CheckpointError that says what is missing."""
    if not config.loss.perceptual_weight:
        return None
    path, size = config.loss.perceptual_path, config.data.image_size
    if not path or not Path(path).exists():
        raise ValueError(
            "train-vae: loss.perceptual_path must be a file, or a folder of files, with the weights of LPIPS on VGG16 "
            f"(nothing is downloaded) while loss.perceptual_weight is {config.loss.perceptual_weight}, got {path!r}; "
            "loss.perceptual_weight 0 trains without"
        )
    if size and min(size) < MIN_PERCEPTUAL_SIZE:
        raise ValueError(
            f"train-vae: data.image_size must be at least {MIN_PERCEPTUAL_SIZE} x {MIN_PERCEPTUAL_SIZE} for LPIPS, "
            f"got {size}"
        )
    paths = [Path(path)] if Path(path).is_file() else loose_weights(Path(path)) or [Path(path)]
    weights = {name: tensor for part in paths for file in weight_files(part) for name, tensor in file.tensors()}
    return LPIPS.from_weights(weights, source=path).to(device)


def _image_weights(source: str) -> dict[str, Tensor]:
    """The first stage of a latent diffusion model, alone or inside the whole model's file."""
    prefix = "first_stage_model."
    weights = {name: tensor for file in weight_files(resolve(source)) for name, tensor in file.tensors()}
    inner = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    return inner or weights


class _VAETask:
    """The parts of the loop's job: what a step computes, what is exported, what is measured and shown."""

    def __init__(
        self,
        config: TrainVAEConfig,
        vae: VideoVAE | CausalVideoVAE,
        discriminator: PatchDiscriminator | None,
        perceptual: LPIPS | None,
        clips: ClipDataset,
        heldout: ClipDataset | None,
        context: ParallelContext,
    ) -> None:
        self.config, self.vae, self.discriminator, self.context = config, vae, discriminator, context
        self.clips, self.heldout = clips, heldout
        self.losses = VAELoss(config.loss, perceptual=perceptual)
        options = config.adversary
        common = {"start": options.start, "kind": options.loss}
        self.generator_loss = GeneratorLoss(factor=options.weight * options.factor, **common)
        self.judgement = DiscriminatorLoss(factor=options.factor, **common)
        self.last_layer = _LastLayer(_decoder(vae, config)) if discriminator is not None else None
        self.seen: tuple[Tensor, Tensor] | None = None

    @property
    def adversary(self) -> Adversary | None:
        if self.discriminator is None:
            return None
        return Adversary(
            {"discriminator": self.discriminator}, self.discriminator_loss, self.config.adversary.optimizer
        )

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        x_BCTHW = self._moved(_mixed(batch["video"], self.config, self.vae))
        output = self._run(x_BCTHW, decode_pixels=self.config.loss.use_real_rec_loss)
        losses = self.losses(x_BCTHW, output)
        total = losses.total
        terms = {name: value for name, value in vars(losses).items() if name != "total" and value is not None}
        terms["num_samples"] = torch.tensor(float(len(x_BCTHW)))
        if self.discriminator is not None:
            self.seen = (x_BCTHW, output.x_rec.detach())
            terms["adversarial"] = self._adversarial(output.x_rec, losses.reconstruction, batch["step"])
            total = total + terms["adversarial"]
        return total, terms

    def _adversarial(self, x_rec: Tensor, reconstruction: Tensor, step: int) -> Tensor:
        """The VAE's term against the discriminator; upstream's counter is at 2 * step when the VAE's turn comes."""
        if 2 * step < self.config.adversary.start:
            return x_rec.new_zeros((), dtype=torch.float32)
        score = at_reconstruction(lambda leaf: self.generator_loss.score(self.discriminator(leaf)), x_rec)
        return self.generator_loss.weighted(score, reconstruction, self.last_layer.weight, 2 * step)

    def discriminator_loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Its loss on the clips of the VAE's last step, as they were and reconstructed: one step of upstream's on."""
        assert self.seen is not None
        (real, fake), self.seen = self.seen, None
        logits = self.discriminator(real), self.discriminator(fake)
        loss = self.judgement(*logits, 2 * batch["step"] + 1)
        return loss, {"logits_real": logits[0].float().mean(), "logits_fake": logits[1].float().mean()}

    def export(self, folder: Path, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        state, config = dict(states["vae"]), self.vae.config
        if isinstance(config, VideoVAEConfig) and not self.config.freeze_encoder:
            mean_C, std_C = self._latent_statistics()
            state |= {"shift": mean_C.view(1, -1, 1, 1, 1), "scale": std_C.view(1, -1, 1, 1, 1)}
            config = replace(config, shift=tuple(mean_C.tolist()), scale=tuple(std_C.tolist()))
        save_model(folder / "vae", state, config)

    def sample(self, folder: Path, step: int) -> dict[str, float]:
        """A sheet of clips above their reconstructions, a video of each pair side by side, and scores of both sets."""
        values = {}
        for name, clips in (("train", self.clips), ("heldout", self.heldout)):
            if clips is None:
                continue
            indices = _spread(len(clips), NUM_SAMPLE_CLIPS)
            pairs = [self._pair(clips, index) for index in indices]
            if self.context.is_main:
                write_contact_sheet(folder / f"{name}-{step:08d}.png", [side for pair in pairs for side in pair])
                for index, pair in zip(indices, pairs, strict=True):
                    fps = clips.manifest.clips[index].fps / clips.frame_interval
                    if len(pair[0]) > 1 and fps > 0:
                        write_mp4(folder / f"{name}-{step:08d}-{index}.mp4", torch.cat(pair, dim=-1), fps=fps)
            scores = torch.stack([scores_of_clip(*pair) for pair in pairs]).mean(0)
            values |= {f"{score}_{name}": float(value) for score, value in zip(SCORES, scores, strict=True)}
        return values

    def validate(self, step: int) -> dict[str, float]:
        """Scores of held-out clips, shared among the ranks that read different batches."""
        indices = _spread(len(self.heldout), self.config.num_validation_clips)
        context, sums = self.context, torch.zeros(1 + len(SCORES))
        for start in range(0, len(indices), context.data_world_size):
            number = start + context.data_rank
            # In the last round some ranks have no clip of their own, but all go through a sharded model together.
            scores = scores_of_clip(*self._pair(self.heldout, indices[number % len(indices)])).float()
            if number < len(indices):
                sums += torch.cat([torch.ones(1), scores.cpu()])
        count, *totals = context.mean(sums.to(context.device)).tolist()
        return {f"validation/{name}": total / count for name, total in zip(SCORES, totals, strict=True)}

    def _pair(self, clips: ClipDataset, index: int) -> tuple[Tensor, Tensor]:
        """A clip and its reconstruction from posterior means, uint8."""
        clip = clips[index]
        for path, reason in clip["skipped"]:
            skipped_logger.warning("skipped %s, to be compared: %s", path, reason)
        x_BCTHW = self._moved(clip["video"][None])
        return to_uint8(x_BCTHW[0]), to_uint8(self._run(x_BCTHW, use_mean=True).x_rec[0])

    def _run(self, x_BCTHW: Tensor, *, decode_pixels: bool = True, use_mean: bool = False) -> VAEOutput:
        """Through `forward`, since a sharded model is whole in there alone."""
        options: dict[str, Any] = {"draw_noise": torch.zeros_like} if use_mean else {}
        if isinstance(self.config.vae, VideoVAEConfig):
            options["through_time"] = not self.config.spatial_only
        return self.vae(x_BCTHW, decode_pixels=decode_pixels, **options)

    def _latent_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel of z over up to `num_statistics_clips` training clips."""
        sums, squares, count = 0.0, 0.0, 0
        for index in _spread(len(self.clips), self.config.num_statistics_clips):
            x_BCTHW = self._moved(self.clips[index]["video"][None])
            z_CN = self.vae(x_BCTHW, decode_pixels=False, draw_noise=torch.zeros_like).z[0].flatten(1).double()
            sums, squares, count = sums + z_CN.sum(1), squares + z_CN.square().sum(1), count + z_CN.shape[1]
        mean_C = sums / count
        std_C = (squares / count - mean_C.square()).clamp(min=0).sqrt()
        return mean_C.float().cpu(), std_C.float().cpu()

    def _moved(self, x_BCTHW: Tensor) -> Tensor:
        return x_BCTHW.to(self.context.device, DTYPES[self.config.run.dtype], non_blocking=True)


class _LastLayer:
    """The weight that a decoder's last convolution last multiplied by: whole, where parameters are sharded between
    passes."""

    def __init__(self, decoder: nn.Module) -> None:
        self.weight: Tensor | None = None
        decoder.conv_out.register_forward_pre_hook(self._note)

    def _note(self, layer: nn.Module, _arguments: Any) -> None:
        self.weight = getattr(layer, "conv", layer).weight


def _decoder(vae: VideoVAE | CausalVideoVAE, config: TrainVAEConfig) -> nn.Module:
    """The decoder at whose end an adversarial gradient is weighed: of the stacked VAE the temporal one, as upstream."""
    if isinstance(config.vae, CausalVideoVAEConfig):
        return vae.decoder
    return vae.spatial_vae.module.decoder if config.spatial_only else vae.temporal_vae.decoder


def _mixed(x_BCTHW: Tensor, config: TrainVAEConfig, vae: VideoVAE | CausalVideoVAE) -> Tensor:
    """Some batches become single frames, or all get a random length that the VAE takes, from a random start."""
    num_frames = x_BCTHW.shape[2]
    length = num_frames
    if config.mixed == "random":
        lengths = _valid_lengths(vae, num_frames)
        length = lengths[int(torch.randint(len(lengths), ()))]
    elif config.mixed == "image" and torch.rand(()) < config.mixed_image_ratio:
        length = 1
    start = int(torch.randint(0, num_frames - length + 1, ()))
    return x_BCTHW[:, :, start : start + length]


def _valid_lengths(vae: VideoVAE | CausalVideoVAE, num_frames: int) -> list[int]:
    """Up to `num_frames`, those that the VAE takes: all of the stacked one's, 1, 5, 9, ... of Open-Sora-Plan's."""
    return [length for length in range(1, num_frames + 1) if vae.padded_frames(length) == length]


def _spread(total: int, count: int) -> list[int]:
    """Up to `count` of `total` indices, evenly spread."""
    count = min(total, count)
    return [i * total // count for i in range(count)]
