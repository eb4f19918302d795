"""Frames that are given rather than generated: at inference by a mask strategy, in training at random.

A mask says per latent frame how much of it is generated. Inference masks are fp32: 1 generate, 0 keep the reference,
between them edit it. Training masks are bool: True noised, False given. B batch, C channels, T latent frames.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor


class MaskGroup(NamedTuple):
    """Frames [reference_start, + length) of a reference go to [target_start, + length) of the clip of loop `loop`.

    Starts are latent frames, negative ones count from the end; `edit_ratio` 0 keeps the frames, 1 generates them.
    """

    loop: int = 0
    reference: int = 0
    reference_start: int = 0
    target_start: int = 0
    length: int = 1
    edit_ratio: float = 0.0


def parse_mask_strategy(strategy: str | None) -> list[MaskGroup]:
    """Parse "loop,reference,reference_start,target_start,length,edit_ratio;..." into its groups.

    Fields left out at the end of a group take the defaults 0,0,0,0,1,0. None and "" have no groups.
    Errors: ValueError naming the group and the field.
    Source: Open-Sora v1.2.0, opensora/utils/inference_utils.py.
    """
    if not strategy:
        return []
    groups = []
    for number, text in enumerate(strategy.split(";")):
        where = f"mask_strategy: group {number} ({text!r})"
        fields = text.split(",")
        if len(fields) > len(MaskGroup._fields):
            raise ValueError(f"{where} must have at most {len(MaskGroup._fields)} fields, got {len(fields)}")
        values: list[float] = []
        for name, field in zip(MaskGroup._fields, fields, strict=False):
            convert = float if name == "edit_ratio" else int
            try:
                values.append(convert(field))
            except ValueError as error:
                raise ValueError(f"{where}: {name} must be a {convert.__name__}, got {field!r}") from error
        group = MaskGroup(*values)
        if not 0.0 <= group.edit_ratio <= 1.0:
            raise ValueError(f"{where}: edit_ratio must lie in [0, 1], got {group.edit_ratio}")
        if group.length < 1:
            raise ValueError(f"{where}: length must be at least 1, got {group.length}")
        groups.append(group)
    return groups


def continue_mask_strategy(
    strategy: str | None, *, loop: int, reference: int, length: int, edit_ratio: float = 0.0
) -> str:
    """Add a group: loop number `loop` begins with the last `length` latent frames of reference number `reference`."""
    group = ",".join(map(str, MaskGroup(loop, reference, -length, 0, length, edit_ratio)))
    return f"{strategy};{group}" if strategy else group


def apply_mask_strategy(
    z_BCTHW: Tensor,
    references: Sequence[Sequence[Tensor]],
    strategies: Sequence[str | None],
    loop: int,
    *,
    align: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Put reference latents into the noise `z` where the strategies of loop number `loop` say so.

    Shapes: z (B, C, T, H, W); references[b][i] (C, T_i, H, W); returns a changed copy of z and mask fp32 (B, T), or
        None for the mask when there are no strategies at all.
    Units: latent frames. With `align` (5 in 1.2: the latents of one 17-frame chunk) both starts move to the nearest
        multiple of it that is not behind the last whole chunk: of 15 frames, -1 becomes 10. Lengths are cut to fit.
    Errors: ValueError for a reference that is missing, starts outside of it or outside of z, or other H, W.
    Source: Open-Sora v1.2.0, opensora/utils/inference_utils.py.
    """
    if not strategies:
        return z_BCTHW, None
    num_samples, num_frames = z_BCTHW.shape[0], z_BCTHW.shape[2]
    if len(strategies) != num_samples or len(references) != num_samples:
        raise ValueError(
            f"apply_mask_strategy: z of {num_samples} samples needs as many strategies and lists of references, "
            f"got {len(strategies)} and {len(references)}"
        )
    z_BCTHW = z_BCTHW.clone()
    mask_BT = torch.ones(num_samples, num_frames, dtype=torch.float32, device=z_BCTHW.device)
    for b, strategy in enumerate(strategies):
        for group in parse_mask_strategy(strategy):
            if group.loop != loop:
                continue
            where = f"mask_strategy: sample {b}, group {','.join(map(str, group))}"
            if not 0 <= group.reference < len(references[b]):
                raise ValueError(f"{where}: there are {len(references[b])} references, no number {group.reference}")
            reference_CTHW = references[b][group.reference]
            if reference_CTHW.shape[2:] != z_BCTHW.shape[3:]:
                raise ValueError(
                    f"{where}: reference latents must be {tuple(z_BCTHW.shape[3:])} in height and width, "
                    f"got {tuple(reference_CTHW.shape[2:])}"
                )
            num_reference_frames = reference_CTHW.shape[1]
            source = _resolve_start(group.reference_start, num_reference_frames, align, f"{where}: reference_start")
            target = _resolve_start(group.target_start, num_frames, align, f"{where}: target_start")
            length = max(0, min(group.length, num_frames - target, num_reference_frames - source))
            z_BCTHW[b, :, target : target + length] = reference_CTHW[:, source : source + length].to(z_BCTHW)
            mask_BT[b, target : target + length] = group.edit_ratio
    return z_BCTHW, mask_BT


def _resolve_start(start: int, num_frames: int, align: int | None, where: str) -> int:
    if not -num_frames <= start < num_frames:
        raise ValueError(f"{where} must lie in [-{num_frames}, {num_frames}), got {start}")
    start %= num_frames
    return start if align is None else align_start(start, align, num_frames)


def align_start(start: int, align: int, num_frames: int) -> int:
    """The multiple of `align` nearest to `start` (halves go down), at most that of the last whole chunk."""
    chunk, remainder = divmod(start, align)
    if remainder > align / 2 and chunk < num_frames // align - 1:
        chunk += 1
    return chunk * align


def latent_to_pixel_frames(num_latent_frames: int) -> int:
    """Pixel frames of whole chunks of 5 latent frames, 17 each; ValueError for other counts."""
    if num_latent_frames % 5 != 0:
        raise ValueError(f"condition_frame_length: must be a multiple of 5 latent frames, got {num_latent_frames}")
    return num_latent_frames // 5 * 17


# "intepolate" is how the original's configurations spell it.
MASK_KINDS = (
    "identity",
    "random",
    "intepolate",
    *("quarter_random", "quarter_head", "quarter_tail", "quarter_head_tail"),
    *("image_random", "image_head", "image_tail", "image_head_tail"),
)


class MaskGenerator:
    """Draws which latent frames of a training clip are noised (True) and which are given clean (False).

    Args:
        ratios: probabilities of the kinds. `quarter_*` gives 1 to T // 4 frames, `image_*` one frame, at the head, the
            tail, both or anywhere; `random` each frame with a probability from U(0.1, 0.9); `intepolate` every second
            frame; `identity` none. What is missing to 1 goes to identity.
        short_clips: what happens with fewer than 4 frames (less than one for `quarter_*`) or when no frame would be
            noised: "adapt" gives one frame and keeps the last one noised; "original" raises, or returns all False
            (a loss of NaN).
        generator: source of the draws; None is Python's global one.

    Errors: ValueError for unknown kinds and for probabilities that are negative or sum to more than 1.
    Source: Open-Sora v1.2.0, opensora/utils/train_utils.py, whose draws it repeats in their order.
    """

    def __init__(
        self,
        ratios: Mapping[str, float],
        *,
        short_clips: Literal["adapt", "original"] = "adapt",
        generator: random.Random | None = None,
    ) -> None:
        unknown = [kind for kind in ratios if kind not in MASK_KINDS]
        if unknown:
            raise ValueError(f"mask_ratios: kinds must be among {', '.join(MASK_KINDS)}, got {', '.join(unknown)}")
        total = sum(ratios.values())
        if min(ratios.values(), default=0.0) < 0 or total > 1 + 1e-6:
            raise ValueError(f"mask_ratios: must be at least 0 and sum to at most 1, got {dict(ratios)}")
        self.ratios = dict(ratios)
        self.ratios.setdefault("identity", 1.0 - total)
        self.short_clips = short_clips
        self._random = generator or random

    def __call__(
        self,
        batch_size: int,
        num_frames: int,
        *,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Masks for a batch, bool (batch_size, num_frames); `generator` is for the kind "random" (on the CPU)."""
        masks = [self.draw(num_frames, generator=generator) for _ in range(batch_size)]
        return torch.stack(masks).to(device)

    def draw(self, num_frames: int, *, generator: torch.Generator | None = None) -> Tensor:
        """One mask, bool (num_frames,) on the CPU. An image is always noised."""
        kind = self._draw_kind()
        mask_T = torch.ones(num_frames, dtype=torch.bool)
        if num_frames <= 1 or kind == "identity":
            return mask_T
        if kind == "random":
            ratio = self._random.uniform(0.1, 0.9)
            mask_T = torch.rand(num_frames, generator=generator) > ratio
            mask_T[-1] |= ~mask_T.any()
        elif kind == "intepolate":
            mask_T[self._random.randint(0, 1) :: 2] = False
        else:
            amount, _, place = kind.partition("_")
            size = 1 if amount == "image" else self._random.randint(1, self._largest_quarter(num_frames, kind))
            if place == "random":
                start = self._random.randint(0, num_frames - size)
                mask_T[start : start + size] = False
            if place in ("head", "head_tail"):
                mask_T[:size] = False
            if place in ("tail", "head_tail"):
                mask_T[-size:] = False
        if self.short_clips == "adapt":
            mask_T[-1] |= ~mask_T.any()
        return mask_T

    def _draw_kind(self) -> str:
        draw, accumulated = self._random.random(), 0.0
        for kind, ratio in self.ratios.items():
            accumulated += ratio
            if draw < accumulated:
                return kind
        return "identity"

    def _largest_quarter(self, num_frames: int, kind: str) -> int:
        if num_frames < 4 and self.short_clips == "original":
            raise ValueError(f"mask_ratios: {kind} needs at least 4 latent frames, got {num_frames}")
        return max(1, num_frames // 4)
