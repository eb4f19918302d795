"""Small decoders and encoders in the style of the families in use: what mixes frames differs from one to the next.

Axes: B batch, C channels, T frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensora.vae import TemporalVAE
from opensora_kernels import Norm, causal_conv3d, group_norm_silu, rms_norm_silu, upsample_conv3d


class Conv(nn.Module):
    """Weights of a convolution for our operators."""

    def __init__(self, inputs: int, outputs: int, *size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, *size) * (inputs * 9) ** -0.5)
        self.bias = nn.Parameter(torch.randn(outputs) * 0.1)

    def forward(self, x: Tensor, **options: object) -> Tensor:
        return causal_conv3d(x, self.weight, self.bias, **options)


class ResBlock(nn.Module):
    """Norm, SiLU, convolution, twice, and the input added; the norm is the operator's."""

    def __init__(self, channels: int, norm: Callable[[nn.Parameter], Norm], **padding: str) -> None:
        super().__init__()
        self.scales = nn.ParameterList(torch.rand(channels) + 0.5 for _ in range(2))
        self.convs = nn.ModuleList(Conv(channels, channels, 3, 3, 3) for _ in range(2))
        self.norm, self.padding = norm, padding

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.convs
        hidden = first(x, norm=self.norm(self.scales[0]), activation="silu", **self.padding)
        return second(hidden, norm=self.norm(self.scales[1]), activation="silu", residual=x, **self.padding)


class FrameAttention(nn.Module):
    """Attention between the pixels of each frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, channels)
        self.to_qkv, self.to_out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        b, c, t, h, w = x.shape
        frames = x.permute(0, 2, 1, 3, 4).reshape(b * t, c, h, w)
        tokens = self.norm(frames).flatten(2).transpose(1, 2)
        q, k, v = self.to_qkv(tokens).unflatten(2, (3, 1, c)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = self.to_out(F.scaled_dot_product_attention(q, k, v).squeeze(1))
        return x + mixed.transpose(1, 2).reshape(b, t, c, h, w).transpose(1, 2)


class WanLike(nn.Module):
    """RMS norms per position; frames doubled from the second one on, rows and columns frame by frame: T -> 4 T - 3."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv_in = Conv(4, channels, 3, 3, 3)
        self.attention = FrameAttention(channels)
        self.blocks = nn.ModuleList(ResBlock(channels, lambda scale: Norm("rms", scale)) for _ in range(3))
        self.time_convs = nn.ModuleList(Conv(channels, 2 * channels, 3, 1, 1) for _ in range(2))
        self.resample = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.scale = nn.Parameter(torch.rand(channels) + 0.5)
        self.conv_out = Conv(channels, 3, 3, 3, 3)

    def forward(self, z: Tensor) -> Tensor:
        x = self.blocks[0](self.attention(self.conv_in(z)))
        for block, time_conv, resample in zip(self.blocks[1:], self.time_convs, self.resample, strict=True):
            b, c, t, h, w = x.shape
            first, rest = x[:, :, :1], x[:, :, 1:]
            if t > 1:
                doubled = time_conv(rest).reshape(b, 2, c, t - 1, h, w)
                rest = torch.stack((doubled[:, 0], doubled[:, 1]), 3).reshape(b, c, 2 * (t - 1), h, w)
            x = torch.cat([first, rest], 2)
            frames = x.permute(0, 2, 1, 3, 4).reshape(-1, c, h, w)
            frames = resample(F.interpolate(frames, scale_factor=(2.0, 2.0), mode="nearest-exact"))
            x = block(frames.view(b, x.shape[2], c, 2 * h, 2 * w).permute(0, 2, 1, 3, 4))
        return self.conv_out(rms_norm_silu(x, self.scale)).clamp(-3.0, 3.0)


class PlanLike(nn.Module):
    """GroupNorm over the clip, first frame repeated in front, both upsamplings of `upsample_conv3d`: T -> 2 T - 1."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        options = {"time_padding": "replicate"}
        self.conv_in = Conv(4, channels, 3, 3, 3)
        self.blocks = nn.ModuleList(
            ResBlock(channels, lambda scale: Norm("group", scale, num_groups=2), **options) for _ in range(2)
        )
        self.attention = FrameAttention(channels)
        self.up_space, self.up_time = Conv(channels, channels, 1, 3, 3), Conv(channels, channels, 3, 3, 3)
        self.up_both = Conv(channels, channels, 3, 3, 3)
        self.mix_factor = nn.Parameter(torch.tensor([0.3]))
        self.norm = nn.GroupNorm(4, channels)
        self.conv_out = Conv(channels, 3, 3, 3, 3)

    def forward(self, z: Tensor) -> Tensor:
        x = self.attention(self.blocks[0](self.conv_in(z, time_padding="replicate")))
        x = upsample_conv3d(x, self.up_space.weight, self.up_space.bias)
        weights = (self.up_time.weight, self.up_time.bias)
        x = upsample_conv3d(x, *weights, mode="linear_time", time_padding="replicate", mix_factor=self.mix_factor)
        x = upsample_conv3d(self.blocks[1](x), self.up_both.weight, self.up_both.bias, time_padding="replicate")
        hidden, statistics = self.conv_out(self.norm(x), return_statistics=True)
        return group_norm_silu(hidden, 1, activation=None, statistics=statistics)


class PlainTorch(nn.Module):
    """PyTorch's modules alone: pads in time by F.pad, nn.Conv3d, nn.GroupNorm over the clip, `nearest` in time."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv_in = nn.Conv3d(4, channels, 3, padding=(0, 1, 1))
        self.norms = nn.ModuleList(nn.GroupNorm(2, channels) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv3d(channels, channels, 3) for _ in range(2))
        self.act = nn.SiLU(inplace=True)
        self.conv_out = nn.Conv3d(channels, 3, 3, padding=1)  # reads the next frame too

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_in(torch.cat([z[:, :, :1].expand(-1, -1, 2, -1, -1), z], 2))
        for norm, conv in zip(self.norms, self.convs, strict=True):
            hidden = self.act(norm(x) * 1.5)
            hidden = conv(F.pad(hidden, (1, 1, 1, 1, 2, 0), mode="replicate"))
            hidden += x
            first, rest = hidden.split([1, hidden.shape[2] - 1], dim=2)
            first = F.interpolate(first.squeeze(2), scale_factor=2.0).unsqueeze(2)
            x = first
            if rest.shape[2]:
                x = torch.cat([first, F.interpolate(rest, scale_factor=2.0, mode="nearest")], 2)
        return self.conv_out(x) - x.mean(1, keepdim=True)


class ByFrame(nn.Module):
    """2-D blocks on every frame, norms per frame, attention per frame, and one convolution over time."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, channels, 3, padding=1)
        self.norm = nn.GroupNorm(2, channels)
        self.conv = nn.Conv2d(channels, 4 * channels, 3, padding=1)
        self.attention = FrameAttention(channels)
        self.block = ResBlock(channels, lambda scale: Norm("group", scale, num_groups=2, per_frame=True))
        self.norm_out = nn.LayerNorm(channels)
        self.conv_out = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        b, _, t = z.shape[:3]
        frames = self.conv_in(z.transpose(1, 2).flatten(0, 1))
        frames = frames + F.pixel_shuffle(self.conv(F.silu(self.norm(frames))), 2)[..., ::2, ::2]
        x = self.block(self.attention(frames.unflatten(0, (b, t)).transpose(1, 2)))
        x = x * torch.linspace(0.5, 1.5, t, dtype=x.dtype)[:, None, None]  # a number for each frame
        x = self.norm_out(x.movedim(1, -1)).movedim(-1, 1)
        return self.conv_out(x.transpose(1, 2).reshape(b * t, -1, *x.shape[3:])).unflatten(0, (b, t)).transpose(1, 2)


class Encoder(nn.Module):
    """Halves the frames twice, by a strided convolution and by a mean over pairs, the first frame alone."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv_in = Conv(3, channels, 3, 3, 3)
        self.down = Conv(channels, channels, 3, 3, 3)
        self.block = ResBlock(channels, lambda scale: Norm("rms", scale))
        self.conv_out = Conv(channels, 8, 3, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(self.conv_in(x), stride=2, time_pad=2)
        if x.shape[2] % 2:
            wide = torch.cat([x[:, :, :1], x], 2).to(torch.promote_types(x.dtype, torch.float32))
            x = F.avg_pool3d(wide, (2, 1, 1)).to(x.dtype)  # PyTorch has none for bf16 on the CPU
        return self.conv_out(self.block(x)).chunk(2, 1)[0]


class TemporalDecoder(nn.Module):
    """Open-Sora 1.2's decoder over time: GroupNorm over the clip, depth to time, a frame dropped in front."""

    def __init__(self) -> None:
        super().__init__()
        self.vae = TemporalVAE(filters=8, num_res_blocks=1, num_groups=4)

    def forward(self, z: Tensor) -> Tensor:
        return self.vae.decode(z, 4 * z.shape[2] - 3)


class TemporalEncoder(TemporalDecoder):
    """Open-Sora 1.2's encoder over time."""

    def forward(self, x: Tensor) -> Tensor:
        return self.vae.encode(torch.cat([x, x[:, :1]], 1)).mode()


DECODERS: dict[str, Callable[[], nn.Module]] = {
    "wan": WanLike,
    "plan": PlanLike,
    "torch": PlainTorch,
    "by_frame": ByFrame,
    "open_sora": TemporalDecoder,
}
ENCODERS: dict[str, Callable[[], nn.Module]] = {"strides": Encoder, "open_sora": TemporalEncoder}
PER_POSITION = ("wan", "by_frame", "strides")  # no norm of theirs looks at other frames


def build(kind: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval().requires_grad_(False).to(dtype)
