"""Bytes of tensors alive at once, counted at every operator."""

from __future__ import annotations

import weakref

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """The most bytes alive at once that were allocated while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.meet((args, kwargs), is_new=False)
        outputs = func(*args, **(kwargs or {}))
        self.meet(outputs, is_new=True)
        self.peak = max(self.peak, self.live)
        return outputs

    def meet(self, tree: object, is_new: bool) -> None:
        for storage in (leaf.untyped_storage() for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)):
            if storage._cdata not in self.known:
                num_bytes = storage.nbytes() if is_new else 0
                self.known.add(storage._cdata)
                self.live += num_bytes
                weakref.finalize(storage, self.forget, storage._cdata, num_bytes)

    def forget(self, key: int, num_bytes: int) -> None:
        self.known.discard(key)
        self.live -= num_bytes
