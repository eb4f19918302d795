"""What a user could call in place of our operators: one adapter for each operator and rival.

An adapter takes the arguments of our public function and returns the call to be timed, ready made: a module is built
and its weights are put in place before the clock starts. Its `why_not` is a sentence where the rival is not installed,
does not run here, or does not compute this. Adapters may return the first of our results alone.
"""

from __future__ import annotations

from bench.peers.registry import PACKAGES, Peer, peers_of

from . import attention, convolution, norms, tokens

__all__ = ["PACKAGES", "Peer", "attention", "convolution", "norms", "peers_of", "tokens"]
