"""Text embeddings on disk, found by their content: an encoder of 19 GB is loaded only for texts that are new."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from opensora.text.t5 import TextEncoder

_READ_AT_ONCE = 1 << 20


def identity_of(folder: str | Path, *, known: Path | None = None) -> str:
    """A digest of an encoder's folder: names and whole contents of its files.

    known: a JSON file that keeps digests by path, size and time of change in ns, so that 19 GB are read once; what it
    lacks is added. A file that changes and keeps all three counts as the same there. Errors: ValueError for something
    else than a folder with a config.json.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"text encoder: must be a folder with a config.json to be recognised, got {folder}")
    before = _read_digests(known) if known is not None else {}
    digests, identity = dict(before), hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        status = path.stat()
        key = f"{path.resolve()}:{status.st_size}:{status.st_mtime_ns}"
        if key not in digests:
            digests[key] = _digest_of(path)
        identity.update(f"{path.name}:{digests[key]}:".encode())
    if known is not None and digests != before:
        with suppress(OSError):  # a cache that may only be read still serves, slower
            known.parent.mkdir(parents=True, exist_ok=True)
            with _replacing(known) as temporary:
                temporary.write_text(json.dumps(digests, indent=1))
    return identity.hexdigest()


def _digest_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_READ_AT_ONCE):
            digest.update(block)
    return digest.hexdigest()


def _read_digests(path: Path) -> dict[str, str]:
    """Empty for a file that is absent or damaged."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file that takes the name `path` when the block ends well, and vanishes when it does not."""
    handle, name = tempfile.mkstemp(prefix=".partial-", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


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
        tensors = {"embedding": embedding_LC.cpu().contiguous(), "mask": mask_L.cpu().contiguous()}
        with _replacing(path) as temporary:
            save_file(tensors, temporary, metadata={"caption": caption})

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
