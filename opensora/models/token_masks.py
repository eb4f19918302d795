"""Which tokens of each row a mask keeps, in the form that attention reads: the kept ones first, and how many.

Axes: R rows, L tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class KeptTokens(NamedTuple):
    """`order` (R, num_tokens) lists each row's kept tokens first, or is None where they already are; `lengths` (R,)
    counts them, or is None where all rows keep num_tokens. Attention doesn't mind the order of its keys."""

    num_tokens: int
    order: Tensor | None
    lengths: Tensor | None

    def of(self, x_RL: Tensor) -> Tensor:
        """(R, L, *) -> (R, num_tokens, *), the kept tokens of each row first and in their order."""
        if self.order is None:
            return x_RL[:, : self.num_tokens]
        index = self.order.to(x_RL.device).reshape(self.order.shape + (1,) * (x_RL.ndim - 2))
        return torch.take_along_dim(x_RL, index, dim=1)

    def repeated(self, copies: int) -> KeptTokens:
        """The same for `copies` times the rows, one whole batch after another."""
        order = None if self.order is None else self.order.repeat(copies, 1)
        return KeptTokens(self.num_tokens, order, None if self.lengths is None else self.lengths.repeat(copies))


def kept_tokens(mask_RL: Tensor) -> KeptTokens:
    """Tokens with mask != 0. The mask is read on the host once; the result lies on the mask's device."""
    is_kept = (mask_RL != 0).cpu()
    lengths = is_kept.sum(dim=1)
    num_tokens = int(lengths.max())
    order = None
    if not bool((is_kept[:, :-1] >= is_kept[:, 1:]).all()):
        order = torch.argsort((~is_kept).to(torch.int8), dim=1, stable=True)[:, :num_tokens].to(mask_RL.device)
    is_full = bool((lengths == num_tokens).all())
    return KeptTokens(num_tokens, order, None if is_full else lengths.to(mask_RL.device))
