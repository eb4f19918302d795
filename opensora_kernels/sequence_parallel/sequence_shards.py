"""The tokens of one sample spread over ranks, as a value that a model is given."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from opensora_kernels.checks import check_choice, check_float, check_mask, check_same_device, check_shape
from opensora_kernels.ops.attention import attention
from opensora_kernels.ops.qk_norm_attention import qk_norm_attention
from opensora_kernels.ops.qk_norm_rope import NormScope, Order, RopeLayout, check_qk_norm_rope
from opensora_kernels.shards import shard_sizes

from .all_to_all import Route
from .attention import by_heads, by_tokens
from .ranks import check_share, rank_and_size
from .ring import ring_attention
from .split_gather import GradScale, gather_sequence, split_sequence, sum_sequence


@dataclass(frozen=True)
class SequenceShards:
    """How the tokens of a sequence lie on ranks: cut, attended to and put together by the methods.

        sequence = SequenceShards(ulysses=mesh["ulysses"].get_group(), ring=mesh["ring"].get_group(), group=group)
        x = sequence.split(x, dim=1, grad_scale="down")  # (B, L, C) -> (B, L_local, C)
        q, k, v = to_qkv(x).unflatten(-1, (3, num_heads, -1)).unbind(-3)
        out = sequence.attention(q, k, v, sequence_length=length)
        out = sequence.gather(out.flatten(-2), dim=1, length=length, grad_scale="up")

    `group` holds all ranks of one sequence. Those of a `ulysses` group follow one another in it: a rank is its rank in
    `ring` times the size of `ulysses` plus its rank there, as in a mesh of the axes (ring, ulysses). A share is what
    `torch.tensor_split` over `group` makes it: any length will do, and a share may be empty. In attention, the ranks of
    a `ulysses` group exchange their tokens for a share of the heads each, and those of a `ring` pass keys and values
    round. A group is None, or of one rank, where there is nothing to share: SequenceShards() is one process. `route`
    says how the exchanges of a `ulysses` group travel: see `sequence_all_to_all`.

    Gradients: between split(grad_scale="down") and gather(grad_scale="up"), and for all that ranks compute alike, the
    average over all ranks of a parameter's gradient is that of one process.
    Errors: ValueError for groups without this process, of sizes that do not fit, or in another order, and for another
    route. A rank that raises leaves the others waiting until the group's timeout.
    Source: DeepSpeed-Ulysses (arXiv 2309.14509), ring attention (arXiv 2310.01889), both together (arXiv 2405.07719).
    """

    ulysses: dist.ProcessGroup | None = None
    ring: dist.ProcessGroup | None = None
    group: dist.ProcessGroup | None = None
    route: Route = "auto"

    def __post_init__(self) -> None:
        op = "SequenceShards"
        check_choice(op, "route", self.route, Route)
        (rank, num_ranks), (across, num_across), (along, num_along) = (
            rank_and_size(op, group) for group in (self.group, self.ulysses, self.ring)
        )
        if num_ranks != num_across * num_along:
            raise ValueError(
                f"{op}: group must hold all ranks of ulysses and ring, {num_across} x {num_along}, got {num_ranks}"
            )
        if rank != along * num_across + across:
            raise ValueError(
                f"{op}: group must list the {num_across} ranks of ulysses one after another: rank {across} there and "
                f"{along} of the ring is {along * num_across + across}, got {rank}"
            )

    @property
    def rank(self) -> int:
        """Which share of a sequence this process has."""
        return rank_and_size("SequenceShards", self.group)[0]

    @property
    def num_ranks(self) -> int:
        return rank_and_size("SequenceShards", self.group)[1]

    def sizes(self, length: int) -> list[int]:
        """The share of each rank of `group` of an axis of `length`."""
        return shard_sizes(length, self.num_ranks)

    def split(self, x: Tensor, *, dim: int, grad_scale: GradScale = "none") -> Tensor:
        """This rank's share of x, which all ranks hold: see `split_sequence`."""
        return split_sequence(x, dim=dim, group=self.group, grad_scale=grad_scale)

    def gather(self, x: Tensor, *, dim: int, length: int, grad_scale: GradScale = "none") -> Tensor:
        """The shares of all ranks put together on each of them: see `gather_sequence`."""
        return gather_sequence(x, dim=dim, length=length, group=self.group, grad_scale=grad_scale)

    def sum(self, x: Tensor, *, dim: int) -> Tensor:
        """This rank's share along `dim` of the sum of all ranks' x, (*, L, *) -> (*, L_local, *): a reduce-scatter, in
        fp32 and rounded once. Gradients: all ranks' gradients gathered."""
        return sum_sequence(x, dim=dim, group=self.group)

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_weight: Tensor | None = None,
        k_weight: Tensor | None = None,
        *,
        sequence_length: int,
        num_keys: int | None = None,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        eps: float = 1e-6,
        order: Order = "norm_rope",
        rope_layout: RopeLayout = "interleaved",
        norm_scope: NormScope = "head",
        scale: float | None = None,
        key_lengths: Tensor | None = None,
        key_mask: Tensor | None = None,
        overlap: bool = False,
    ) -> Tensor:
        """attention(*qk_norm_rope(q, k, ...), v) of all tokens: those of one process, whatever the ranks.

        Shapes: q (*, L_local, N, D), this rank's share of `sequence_length`; k, v (*, Lk_local, N, D), its share of
        `num_keys`, by default as many; any strides. cos, sin (L_local, D/2) of its tokens, for as many keys as queries;
        weights and options as in `qk_norm_rope`. key_lengths (*), whole numbers, or key_mask (*, num_keys), booleans:
        the keys of the whole sequence that are attended to, the first so many or any; a sample without any gives zeros,
        and all must be finite. Returns (*, L_local, N, D), contiguous, in q's dtype.
        overlap: v travels to the heads while q and k are normed and rotated; the same numbers. False by route "peer".
        Numbers: those of `qk_norm_rope` and `attention`; a ring computes and adds up in fp32, and rounds once.
        Gradients: every tensor's own, not twice; those of weights are of this rank's tokens. All ranks must run
        backward.
        Errors: those of `qk_norm_rope` and `attention`; ValueError for a tensor that is not this rank's share, or both
        key_lengths and key_mask.
        """
        op = "SequenceShards.attention"
        num_keys = sequence_length if num_keys is None else num_keys
        check_qk_norm_rope(op, q, k, q_weight, k_weight, cos, sin, order, rope_layout, norm_scope)
        self._check(op, q, k, v, sequence_length, num_keys, key_lengths, key_mask)
        options = {
            "cos": cos,
            "sin": sin,
            "eps": eps,
            "order": order,
            "rope_layout": rope_layout,
            "norm_scope": norm_scope,
        }
        if self.num_ranks == 1 and q.shape == k.shape and key_lengths is None and key_mask is None:
            return qk_norm_attention(q, k, v, q_weight, k_weight, scale=scale, **options)
        along, _ = rank_and_size(op, self.ring)
        chunks = self._chunk_sizes(num_keys)
        lengths = self._chunk_sizes(sequence_length)[along], chunks[along]
        num_heads = q.shape[-2]
        travel = {"group": self.ulysses, "route": self.route}
        q, k, v = by_heads(op, q, k, v, q_weight, k_weight, lengths=lengths, overlap=overlap, **travel, **options)
        key_lengths = _lengths_of_chunks(key_lengths, chunks, q.device)
        if key_mask is not None:
            masks = key_mask.to(q.device).split(chunks, -1)
            key_lengths = [mask.sum(-1) for mask in masks]
            k, v = _kept_first(masks[along], k, v)
        if len(chunks) == 1:
            out = attention(q, k, v, scale=scale, key_lengths=key_lengths[0])
        else:
            scale = q.shape[-1] ** -0.5 if scale is None else scale
            out = ring_attention(q, k, v, scale=scale, key_sizes=chunks, key_lengths=key_lengths, group=self.ring)
        return by_tokens(out, num_heads=num_heads, **travel)

    def _chunk_sizes(self, length: int) -> list[int]:
        """Tokens of each rank of the ring, once the exchange has put the shares of its `ulysses` group together."""
        num_across = rank_and_size("SequenceShards", self.ulysses)[1]
        sizes = self.sizes(length)
        return [sum(sizes[start : start + num_across]) for start in range(0, len(sizes), num_across)]

    def _check(
        self,
        op: str,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        num_queries: int,
        num_keys: int,
        key_lengths: Tensor | None,
        key_mask: Tensor | None,
    ) -> None:
        for name, tensor, length in (("q", q, num_queries), ("k", k, num_keys), ("v", v, num_keys)):
            check_float(op, name, tensor)
            check_share(op, name, tensor, tensor.dim() - 3, length, self.rank, self.num_ranks)
            if tensor.dtype != q.dtype:
                raise TypeError(f"{op}: {name} must have q's dtype {q.dtype}, got {tensor.dtype}")
        check_shape(op, "v", v, k.shape, "that of k, (*, Lk_local, N, D)")
        check_same_device(op, q=q, v=v)
        if key_lengths is not None:
            if key_mask is not None:
                raise ValueError(f"{op}: key_mask must be None where key_lengths are given, got both")
            if key_lengths.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"{op}: key_lengths must be int32 or int64, got {key_lengths.dtype}")
            check_shape(op, "key_lengths", key_lengths, q.shape[:-3], "(*)")
        if key_mask is not None:
            check_mask(op, "key_mask", key_mask)
            check_shape(op, "key_mask", key_mask, (*q.shape[:-3], num_keys), "(*, num_keys)")


def _lengths_of_chunks(
    key_lengths: Tensor | None, chunks: list[int], device: torch.device
) -> list[Tensor] | list[None]:
    """Of the first `key_lengths` keys of a sequence, those that lie in each of its `chunks`."""
    if key_lengths is None:
        return [None] * len(chunks)
    starts = [sum(chunks[:index]) for index in range(len(chunks))]
    return [(key_lengths.to(device) - start).clamp(0, size) for start, size in zip(starts, chunks, strict=True)]


def _kept_first(mask: Tensor, *tensors: Tensor) -> list[Tensor]:
    """(*, K, N, D) with the keys that `mask` (*, K) keeps before the others; attention does not mind their order."""
    order = torch.argsort((~mask).to(torch.int8), dim=-1, stable=True)[..., None, None]
    return [torch.take_along_dim(tensor, order, dim=-3) for tensor in tensors]
