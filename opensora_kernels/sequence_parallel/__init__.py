"""Sequence parallelism: the tokens of one sample spread over ranks, exchanged where attention needs all of them."""

from .all_to_all import sequence_all_to_all
from .attention import ulysses_attention
from .sequence_shards import SequenceShards
from .split_gather import gather_sequence, split_sequence

__all__ = ["SequenceShards", "gather_sequence", "sequence_all_to_all", "split_sequence", "ulysses_attention"]
