"""Clips cut into patches, and the sites of a frame spread over ranks.

Axes: B batch, C latent channels, T frames, H, W size in latents, S sites of a frame (rows x columns of patches), P
values of a patch, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from opensora_kernels import SequenceShards

Grid = tuple[int, int, int]  # patches along time, height and width


@dataclass(frozen=True)
class Sites:
    """The sites of every frame, of which each rank holds a share. Only attention among them needs those of the others:
    frames of a site, and the text, are all here. One process holds all sites."""

    rows: int
    columns: int
    shards: SequenceShards | None = None

    @property
    def num(self) -> int:
        return self.rows * self.columns

    @property
    def are_here(self) -> bool:
        """Whether this process holds all of them."""
        return self.shards is None or self.shards.num_ranks == 1

    def cut(self, x: Tensor, dim: int) -> Tensor:
        """This rank's share along `dim`; "down" and "up" make parameters' averaged gradients those of one process."""
        return x if self.shards is None else self.shards.split(x, dim=dim, grad_scale="down")

    def whole(self, x: Tensor, dim: int) -> Tensor:
        return x if self.shards is None else self.shards.gather(x, dim=dim, length=self.num, grad_scale="up")

    def num_windows(self, factor: int) -> int:
        """Squares of factor x factor sites; what is left at the far sides is in none."""
        return (self.rows // factor) * (self.columns // factor)

    def padding_to_windows(self, factor: int) -> tuple[int, int, int]:
        """Rows of a grid that holds this rank's sites in whole windows, and sites missing before and after."""
        first, last = self._place()
        top = self._top(factor)
        rows = max(1, -(-(last - top * self.columns) // (factor * self.columns))) * factor
        return rows, first - top * self.columns, (top + rows) * self.columns - last

    def padding_of_windows(self, factor: int) -> tuple[int, int]:
        """Windows of the frame before and after those of that grid; fewer than none after, where it goes on beyond."""
        rows, *_ = self.padding_to_windows(factor)
        of_row = self.columns // factor
        before = self._top(factor) // factor * of_row
        return before, self.num_windows(factor) - before - rows // factor * of_row

    def _top(self, factor: int) -> int:
        return self._place()[0] // self.columns // factor * factor

    def _place(self) -> tuple[int, int]:
        """This rank's first site, and the one after its last."""
        sizes = self.shards.sizes(self.num)
        first = sum(sizes[: self.shards.rank])
        return first, first + sizes[self.shards.rank]


class PatchEmbed3D(nn.Module):
    """Non-overlapping patches to tokens: (B, C, T, H, W) -> (B, T', H'*W', D), zero-padded at the far sides.

    `proj` is upstream's Conv3d, but kernel = stride makes it a matrix product over gathered patches, which every
    backend runs at full speed.
    """

    def __init__(self, patch_size: tuple[int, int, int], in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv3d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def grid(self, x_BCTHW: Tensor) -> Grid:
        """Patches along time, height and width."""
        t, h, w = (-(-size // patch) for size, patch in zip(x_BCTHW.shape[2:], self.patch_size, strict=True))
        return t, h, w

    def forward(self, x_BCTHW: Tensor, sites: Sites) -> Tensor:
        """Of each frame the patches at this rank's `sites`."""
        (t, h, w), (pt, ph, pw) = self.grid(x_BCTHW), self.patch_size
        b, c, *have = x_BCTHW.shape
        if (t * pt, h * ph, w * pw) != tuple(have):
            x_BCTHW = F.pad(x_BCTHW, (0, w * pw - have[2], 0, h * ph - have[1], 0, t * pt - have[0]))
        patches = x_BCTHW.reshape(b, c, t, pt, h, ph, w, pw).permute(0, 2, 4, 6, 1, 3, 5, 7)
        patches_BTSP = sites.cut(patches.reshape(b, t, h * w, c * pt * ph * pw), dim=2)
        return F.linear(patches_BTSP, self.proj.weight.flatten(1), self.proj.bias)


def unpatchify(x_BLP: Tensor, sites: Sites, grid: Grid, patch_size: Grid, size: tuple[int, ...]) -> Tensor:
    """Tokens of p_t*p_h*p_w*C values (C fastest) at this rank's sites to whole (B, C, T, H, W), cropped to `size`, in
    fp32."""
    (t, h, w), (pt, ph, pw) = grid, patch_size
    b, num_tokens, num_values = x_BLP.shape
    x = sites.whole(x_BLP.reshape(b, t, num_tokens // t, num_values), dim=2)
    x = x.view(b, t, h, w, pt, ph, pw, num_values // (pt * ph * pw)).permute(0, 7, 1, 4, 2, 5, 3, 6)
    x = x.reshape(b, x.shape[1], t * pt, h * ph, w * pw)
    return x[:, :, : size[0], : size[1], : size[2]].float()
