"""Sequence parallelism: the tokens of one sample spread over ranks, exchanged where attention needs all of them."""

from .all_to_all import sequence_all_to_all
from .attention import ulysses_attention
from .peers import release_peer_buffers, why_not_peer_to_peer
from .sequence_shards import SequenceShards
from .split_gather import gather_sequence, split_sequence

__all__ = [
    "SequenceShards",
    "gather_sequence",
    "release_peer_buffers",
    "sequence_all_to_all",
    "split_sequence",
    "ulysses_attention",
    "why_not_peer_to_peer",
]
