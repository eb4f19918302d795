"""What the Triton kernels of `modulate` and `gate_residual` share: rows of tokens, and tables chosen by their frame.

A program takes a chunk of the tokens of one frame, so that it loads its tables once. The number of channels is a
constant, and a warp holds a token: of a block of 2048 for 1152 channels, the compiler drops what no channel fills, down
to 10 instructions per channel of modulate's forward pass. In four warps they were 21, of the 27 that an H200 has time
for at its memory bandwidth. (Counted in machine code for sm_90.)

Axes: B batch, T frames, S tokens of a frame, L = T*S, C channels, R = B*L rows, K tables, P programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from opensora_kernels._triton import rows
from opensora_kernels.tuning import configuration

# What a backward pass leaves behind, fp32 sums of each program, is written and read again: with chunks of fewer tokens
# that would cost more than a tenth of the pass.
_SMALLEST_SUMMING_CHUNK = 32


def token_rows(x: Tensor) -> Tensor:
    """x (B, L, C) as (R, C) with the channels side by side: a view where the tokens lie evenly spaced, else a copy."""
    x_RC = rows(x)
    return x_RC if x_RC.stride(1) == 1 else x_RC.contiguous()


def count_frames(x: Tensor, frame_mask: Tensor | None) -> tuple[int, int]:
    """T and S."""
    num_frames = 1 if frame_mask is None else frame_mask.shape[1]
    return num_frames, x.shape[1] // num_frames


def table_pair(table: Tensor | None, table0: Tensor | None) -> list[Tensor | None]:
    """Both tables (B, C) in one dtype, each with its channels side by side."""
    if table is not None and table0 is not None and table.dtype != table0.dtype:
        dtype = torch.promote_types(table.dtype, table0.dtype)
        table, table0 = table.to(dtype), table0.to(dtype)
    return [table if table is None or table.stride(1) == 1 else table.contiguous() for table in (table, table0)]


def table_strides(*tables: Tensor | None) -> list[int]:
    """The distance of each table's rows, 0 for a table that is not there."""
    return [0 if table is None else table.stride(0) for table in tables]


def token_tile(
    op: str, direction: str, x_RC: Tensor, *, channels_per_warp: int = 1152, **constants: int
) -> dict[str, int]:
    """Constants of a kernel. One warp for a whole token, where its registers hold it, sums without shared memory."""
    num_channels = int(x_RC.shape[1])
    num_warps = min(triton.next_power_of_2(triton.cdiv(num_channels, channels_per_warp)), 16)
    block_c = triton.next_power_of_2(num_channels)
    block_s = triton.next_power_of_2(max(1, min(channels_per_warp // block_c, 16)) + 1) // 2
    default = {"BLOCK_S": block_s, "num_warps": num_warps, **constants}
    key = f"{direction} C={num_channels} {x_RC.dtype}"
    return {"NUM_C": num_channels, "BLOCK_C": block_c, **configuration(op, key, default, x_RC.device)}


def summing_chunk(num_frames: int, num_sites: int, block_s: int, num_programs: int) -> int:
    """Tokens to a program of a backward pass, whole blocks, for `num_programs` or fewer, at least one to a frame."""
    chunks_of_frame = max(1, min(num_programs // max(1, num_frames), num_sites // _SMALLEST_SUMMING_CHUNK))
    return triton.cdiv(max(1, triton.cdiv(num_sites, chunks_of_frame)), block_s) * block_s


def table_gradients(partial_KPC: Tensor, num_samples: int, frame_mask: Tensor | None) -> Tensor:
    """Sums of the programs' own sums, (K, B, C); with a mask (2K, B, C), those of frames with True before the others.

    Programs are ordered by sample, then frame.
    """
    num_tables, num_programs, num_channels = partial_KPC.shape
    if num_samples == 0 or num_programs == 0:
        return partial_KPC.new_zeros(num_tables * (1 if frame_mask is None else 2), num_samples, num_channels)
    if frame_mask is None:
        return partial_KPC.view(num_tables, num_samples, -1, num_channels).sum(2)
    of_frames_KBTC = partial_KPC.view(num_tables, num_samples, frame_mask.shape[1], -1, num_channels).sum(3)
    is_first_BT1 = frame_mask[..., None]
    # a product with the mask instead would spread the infinities of frames that chose the other table
    chosen = [torch.where(mask, of_frames_KBTC, 0.0).sum(2) for mask in (is_first_BT1, ~is_first_BT1)]
    return torch.cat(chosen)


@triton.jit
def locate(num_frames, num_sites, chunk_size):
    """This program's frame, counted through all samples, its sample, and its first token of the frame."""
    num_chunks = tl.cdiv(num_sites, chunk_size)
    frame = tl.program_id(0) // num_chunks
    return frame.to(tl.int64), (frame // num_frames).to(tl.int64), tl.program_id(0) % num_chunks * chunk_size


@triton.jit
def is_first_choice(frame_mask_ptr, frame, HAS_MASK: tl.constexpr):
    """Whether the frame takes the first of two tables. Booleans reach a kernel as i1 or as u8, hence the comparison."""
    is_first = True
    if HAS_MASK:
        is_first = tl.load(frame_mask_ptr + frame) != 0
    return is_first


@triton.jit
def inside(offs_s, end, BLOCK_S: tl.constexpr):
    """Tokens before the end of a loop in steps of BLOCK_S; in steps of one, the compiler need not compare."""
    mask = tl.full([BLOCK_S], True, tl.int1)
    if BLOCK_S > 1:
        mask = offs_s < end
    return mask


@triton.jit
def load_tokens(x_ptr, offs_r, mask_r, stride_r, NUM_C: tl.constexpr, BLOCK_C: tl.constexpr):
    offs_c = tl.arange(0, BLOCK_C)
    mask = mask_r[:, None] & (offs_c < NUM_C)[None, :]
    return tl.load(x_ptr + offs_r[:, None] * stride_r + offs_c[None, :], mask=mask, other=0.0)


@triton.jit
def store_tokens(x_ptr, x, offs_r, mask_r, NUM_C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Rounded to the dtype of x_ptr, whose rows follow one another without gaps."""
    offs_c = tl.arange(0, BLOCK_C)
    mask = mask_r[:, None] & (offs_c < NUM_C)[None, :]
    tl.store(x_ptr + offs_r[:, None] * NUM_C + offs_c[None, :], x.to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_table(
    table_ptr, table0_ptr, sample, stride, stride0, is_first,
    HAS_MASK: tl.constexpr, NUM_C: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The sample's row of the table that this program's frame chose, (1, BLOCK_C)."""
    offs_b, mask_b = sample + tl.arange(0, 1), tl.full([1], True, tl.int1)
    if HAS_MASK:
        # lanes that are off read nothing: only the chosen table's bytes move
        row = load_tokens(table_ptr, offs_b, mask_b & is_first, stride, NUM_C, BLOCK_C)
        row = tl.where(is_first, row, load_tokens(table0_ptr, offs_b, mask_b & ~is_first, stride0, NUM_C, BLOCK_C))
    else:
        row = load_tokens(table_ptr, offs_b, mask_b, stride, NUM_C, BLOCK_C)
    return row


@triton.jit
def layer_norm(x, eps, NUM_C: tl.constexpr):
    """(x - mean) / sqrt(variance + eps) in fp32, 0 beyond the channels, and 1 / sqrt(variance + eps)."""
    wide = x.to(tl.float32)
    is_channel = tl.arange(0, x.shape[1]) < NUM_C
    centred = tl.where(is_channel[None, :], wide - tl.sum(wide, 1)[:, None] / NUM_C, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1)[:, None] / NUM_C + eps)
    return centred * rstd, rstd


@triton.jit
def layer_norm_backward(grad, normed, rstd, NUM_C: tl.constexpr):
    """The gradient of x from that of normed = (x - mean) * rstd."""
    mean, slope = tl.sum(grad, 1)[:, None] / NUM_C, tl.sum(grad * normed, 1)[:, None] / NUM_C
    return (grad - mean - normed * slope) * rstd


@triton.jit
def scale_and_shift(x, scale, shift):
    """x * (1 + scale) + shift, rounded where the reference rounds: 1 + scale, the product if both have one dtype, the
    sum."""
    product = x.to(tl.float32) * one_plus(scale)
    if x.dtype == scale.dtype:
        product = product.to(x.dtype).to(tl.float32)
    return (product + shift.to(tl.float32)).to(x.dtype)


@triton.jit
def one_plus(scale):
    return (1.0 + scale.to(tl.float32)).to(scale.dtype).to(tl.float32)


@triton.jit
def store_sum(partial_ptr, table, total, NUM_C: tl.constexpr, BLOCK_C: tl.constexpr):
    """This program's sum over tokens (S, BLOCK_C) into its row of partial_KPC."""
    offs_r = tl.cast(table, tl.int64) * tl.num_programs(0) + tl.program_id(0) + tl.arange(0, 1)
    store_tokens(partial_ptr, tl.sum(total, 0)[None, :], offs_r, tl.full([1], True, tl.int1), NUM_C, BLOCK_C)
