"""How CausalVideoVAE cuts a clip that is too large for one run."""

from __future__ import annotations

from dataclasses import dataclass

from opensora_kernels.vae import Tiling


@dataclass(frozen=True)
class VAETiling:
    """Tiles and windows of CausalVideoVAE, with upstream's attributes; the defaults are those of the releases.

    sample_size, latent_size: pixels and latents of a tile, rows and columns alike. overlap: the share of a tile that
    the next one covers too. sample_frames, latent_frames: frames of a window ("temporal rollback"), None for whole
    clips, as in 1.0.0. Overlaps are rounded down to whole pixels and whole latents, each by itself: where the one is
    no multiple of the other, the joined clip has another size than the one that was not cut.
    Source: Open-Sora-Plan v1.1.0, CausalVAEModel (tile_sample_min_size, tile_latent_min_size, tile_overlap_factor,
    tile_sample_min_size_t, tile_latent_min_size_t).
    """

    sample_size: int = 256
    latent_size: int = 32
    overlap: float = 0.25
    sample_frames: int | None = 65
    latent_frames: int | None = 17

    def of_pixels(self) -> Tiling:
        """For the encoder, which reads pixels and gives latents."""
        return self._tiling(self.sample_size, self.latent_size, self.sample_frames)

    def of_latents(self) -> Tiling:
        """For the decoder, which reads latents and gives pixels."""
        return self._tiling(self.latent_size, self.sample_size, self.latent_frames)

    def _tiling(self, size: int, result_size: int, window: int | None) -> Tiling:
        stride, blend = int(size * (1 - self.overlap)), int(result_size * self.overlap)
        keep = result_size - blend
        return Tiling((size, size), (stride, stride), (blend, blend), (keep, keep), window)


TILING_V1_0 = VAETiling(sample_frames=None, latent_frames=None)
TILING_V1_1 = VAETiling()
