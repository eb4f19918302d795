"""Text embeddings on disk, found by their content: an encoder of 19 GB is loaded only for texts that are new."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from opensora.text.t5 import TextEncoder

_READ_AT_ONCE = 1 << 20


def identity_of(folder: str | Path) -> str:
    """A digest of an encoder's folder: names and sizes of its files, all of the small ones, the head of the large.

    The head of a safetensors file holds names, dtypes and shapes, and the first weights. Errors: ValueError for
    something else than a folder with a config.json.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"text encoder: must be a folder with a config.json to be recognised, got {folder}")
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        digest.update(f"{path.name}:{path.stat().st_size}:".encode())
        with path.open("rb") as stream:
            digest.update(stream.read(_READ_AT_ONCE))
    return digest.hexdigest()


class TextCache:
    """Embeddings and masks of captions in a folder, one safetensors file each, complete or absent.

    identity: what else the embeddings depend on; captions of another encoder, length or dtype are other entries.
    """

    def __init__(self, folder: str | Path, identity: str) -> None:
        self.folder, self.identity = Path(folder), identity

    def get(self, caption: str) -> tuple[Tensor, Tensor] | None:
        """Embeddings (L, C) and mask (L,) on the CPU, or None. A damaged file counts as absent."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            stored = load_file(self._path(caption))
            return stored["embedding"], stored["mask"]
        except (OSError, SafetensorError, KeyError):
            return None

    def put(self, caption: str, embedding_LC: Tensor, mask_L: Tensor) -> None:
        from safetensors.torch import save_file

        path = self._path(caption)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=".partial-", dir=path.parent)
        os.close(handle)
        try:
            tensors = {"embedding": embedding_LC.cpu().contiguous(), "mask": mask_L.cpu().contiguous()}
            save_file(tensors, temporary, metadata={"caption": caption})
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def _path(self, caption: str) -> Path:
        name = hashlib.sha256(json.dumps([self.identity, caption]).encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"


class CachedTextEncoder:
    """Stands for a TextEncoder that is loaded when a caption is met that the cache does not have.

    load: makes the encoder. output_dim, model_max_length: the encoder's, known without it.
    """

    def __init__(
        self, load: Callable[[], TextEncoder], cache: TextCache, *, output_dim: int, model_max_length: int
    ) -> None:
        self._load, self.cache = load, cache
        self.output_dim, self.model_max_length = output_dim, model_max_length
        self._encoder: TextEncoder | None = None
        self._device: torch.device | str | None = None

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embeddings (B, 1, L, C) and mask (B, L), as `TextEncoder.encode` gives them, on the CPU."""
        found = {caption: self.cache.get(caption) for caption in captions}
        absent = [caption for caption, entry in found.items() if entry is None]
        if absent:
            embeddings_B1LC, mask_BL = self._ready().encode(absent)
            for caption, embedding_1LC, mask_L in zip(absent, embeddings_B1LC.cpu(), mask_BL.cpu(), strict=True):
                self.cache.put(caption, embedding_1LC[0], mask_L)
                found[caption] = (embedding_1LC[0], mask_L)
        pairs = [found[caption] for caption in captions]
        return torch.stack([pair[0] for pair in pairs])[:, None], torch.stack([pair[1] for pair in pairs])

    def to(self, device: torch.device | str) -> CachedTextEncoder:
        """Where the encoder is, or will be once it is loaded."""
        self._device = device
        if self._encoder is not None:
            self._encoder.to(device)
        return self

    def eval(self) -> CachedTextEncoder:
        return self

    def _ready(self) -> TextEncoder:
        if self._encoder is None:
            self._encoder = self._load()
            if self._device is not None:
                self._encoder.to(self._device)
        return self._encoder
