"""Autoencoders of diffusers as functions of one tensor, with the loops over frames that they run inside.

diffusers itself is not imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .autoencoder_loops import Steps, decoding, encoding
from .clip import CannotRecord
from .loops import Loop, Step


def is_autoencoder(model: Any) -> bool:
    """Whether `model` is an autoencoder of diffusers, or of a class derived from one."""
    return (
        isinstance(model, nn.Module)
        and any(kind.__module__.startswith("diffusers.models.autoencoders") for kind in type(model).__mro__)
        and all(hasattr(model, name) for name in ("encode", "decode", "encoder", "decoder"))
    )


def decoder_of(vae: nn.Module, **options: Any) -> Callable[[Tensor], Tensor]:
    """z -> vae.decode(z, **options).sample, for `decode` and `plan_tiles`, which stream it by the model's own loop.

    vae: an autoencoder of diffusers, patched or not. options: what else its `decode` takes, such as LTX's temb.
    The caches of a stream are its own: between two chunks `vae` can be used for something else, and a stream that is
    not read to its end leaves nothing behind. Samples of a batch run together, also where the model would slice it.
    Numbers: those of vae.decode, bit for bit where the model's own steps run, but for a 1 x 1 x 1 convolution that
    Wan, Qwen-Image and EasyAnimate run over all latents at once, here step by step: PyTorch rounds a few sizes, such as
    latents of one pixel, differently.
    Errors: TypeError for any other vae. ValueError, when it is to be streamed, for one that steps through frames by
    itself while its tiling is on, since it then runs each tile over all frames; TypeError, when it is to be planned or
    its layers streamed, for any other that joins tiles in place.
    """
    _check(vae, "decoder_of")

    def whole(z: Tensor) -> Tensor:
        try:
            with _naming_its_tiling(vae):
                decoded = vae.decode(z, **options)
        finally:
            _empty(vae)
        return getattr(decoded, "sample", decoded)

    return _with_loop(vae, whole, decoding(vae, options))


def encoder_of(vae: nn.Module) -> Callable[[Tensor], Tensor]:
    """x -> vae.encode(x).latent_dist.mode(), as `decoder_of`."""
    _check(vae, "encoder_of")

    def whole(x: Tensor) -> Tensor:
        try:
            with _naming_its_tiling(vae):
                encoded = vae.encode(x)
        finally:
            _empty(vae)
        if hasattr(encoded, "latent_dist"):
            return encoded.latent_dist.mode()
        return encoded.latent if hasattr(encoded, "latent") else encoded[0]

    return _with_loop(vae, whole, encoding(vae))


def as_function(model: Any, *, encodes: bool = False) -> Any:
    """What stands for an autoencoder of diffusers, or for its bound `decode` or `encode`; any other model itself."""
    if is_autoencoder(model):
        return encoder_of(model) if encodes else decoder_of(model)
    vae = getattr(model, "__self__", None)
    if is_autoencoder(vae) and model in (vae.decode, vae.encode):
        return encoder_of(vae) if model == vae.encode else decoder_of(vae)
    return model


def _check(vae: Any, caller: str) -> None:
    if not is_autoencoder(vae):
        raise TypeError(f"{caller}: vae must be an autoencoder of diffusers, got {type(vae).__name__}")


@contextmanager
def _naming_its_tiling(vae: nn.Module) -> Iterator[None]:
    """Most models write tiles into each other, which cannot be recorded: the error says what to switch off."""
    try:
        yield
    except CannotRecord as error:
        if not getattr(vae, "use_tiling", False):
            raise
        raise CannotRecord(
            f"the tiling of {type(vae).__name__} must be off to plan its memory and to stream its layers: "
            f"call disable_tiling(), or give neither a memory budget nor a plan, got use_tiling=True ({error})"
        ) from error


def _empty(vae: nn.Module) -> None:
    """VidTok's convolutions keep what they read until the next call, EasyAnimate's after a call that failed."""
    if hasattr(vae, "_clear_conv_cache"):
        vae._clear_conv_cache()
    if hasattr(vae, "_empty_causal_cached"):
        vae._empty_causal_cached(vae)


def _with_loop(vae: nn.Module, whole: Callable[[Tensor], Tensor], found: Steps | None) -> Callable[[Tensor], Tensor]:
    if found is None:
        return whole
    return Loop(whole, found.spans, _after_hook(vae, found.step), found.num_frames)


def _after_hook(vae: nn.Module, step: Step) -> Step:
    """Hooks that bring weights to a device run before a model's `decode`, which is not called here."""

    def run(frames: Tensor, state: Any) -> tuple[Tensor, Any]:
        hook = getattr(vae, "_hf_hook", None)
        if hasattr(hook, "pre_forward"):
            hook.pre_forward(vae)
        with _naming_its_tiling(vae):
            return step(frames, state)

    return run
