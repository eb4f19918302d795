"""Text embeddings on disk: the encoder is loaded for new texts alone, and damaged files count as absent."""

from __future__ import annotations

import pytest
import torch

from opensora.text import cache
from opensora.text.cache import CachedTextEncoder, TextCache, identity_of
from opensora.text.tiny import build_tiny_text_encoder

CAPTIONS = ["a red circle", "a blue square"]


class Encoders:
    """Counts how often an encoder is loaded."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.encoder = build_tiny_text_encoder(CAPTIONS, model_max_length=8)
        self.num_loads = 0

    def load(self):
        self.num_loads += 1
        return self.encoder

    def cached(self, folder, identity: str = "tiny") -> CachedTextEncoder:
        length, dim = self.encoder.model_max_length, self.encoder.output_dim
        return CachedTextEncoder(self.load, TextCache(folder, identity), output_dim=dim, model_max_length=length)


def test_known_texts_need_no_encoder_and_come_back_bit_for_bit(tmp_path):
    encoders = Encoders()
    expected = encoders.encoder.encode(CAPTIONS)
    first = encoders.cached(tmp_path).encode(CAPTIONS)
    again = encoders.cached(tmp_path).encode(CAPTIONS[::-1])
    assert encoders.num_loads == 1
    for found, known, reverse in zip(first, expected, again, strict=True):
        assert torch.equal(found, known)
        assert torch.equal(reverse, known.flip(0))


def test_another_encoder_has_other_entries(tmp_path):
    encoders = Encoders()
    encoders.cached(tmp_path).encode(CAPTIONS)
    encoders.cached(tmp_path, "another").encode(CAPTIONS)
    assert encoders.num_loads == 2


def test_a_damaged_file_counts_as_absent(tmp_path):
    encoders = Encoders()
    expected = encoders.cached(tmp_path).encode(CAPTIONS)
    damaged, _ = sorted(tmp_path.rglob("*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:40])
    found = encoders.cached(tmp_path).encode(CAPTIONS)
    assert encoders.num_loads == 2
    assert torch.equal(found[0], expected[0])
    assert not list(tmp_path.rglob(".partial-*"))


def test_an_identity_follows_the_files_of_the_encoder(tmp_path):
    Encoders().encoder.save_pretrained(tmp_path)
    before = identity_of(tmp_path)
    assert identity_of(tmp_path) == before
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"num_heads"', '"num_Heads"'))
    assert identity_of(tmp_path) != before
    with pytest.raises(ValueError, match=r"folder with a config\.json"):
        identity_of(tmp_path / "absent")


def test_an_identity_follows_the_last_byte_of_a_large_file(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    weights = bytearray(3 << 20)
    identities = set()
    for last in (0, 1):
        weights[-1] = last
        (tmp_path / "model.safetensors").write_bytes(weights)
        identities.add(identity_of(tmp_path))
    assert len(identities) == 2


def test_files_are_hashed_once_and_again_when_they_change(tmp_path, monkeypatch):
    folder, known = tmp_path / "encoder", tmp_path / "cache" / "digests.json"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"first")
    read, digest_of = [], cache._digest_of
    monkeypatch.setattr(cache, "_digest_of", lambda path: read.append(path.name) or digest_of(path))
    first = identity_of(folder, known=known)
    assert read == ["config.json", "model.safetensors"]
    assert identity_of(folder, known=known) == first == identity_of(folder)
    assert len(read) == 4  # two of the call that knows none
    (folder / "model.safetensors").write_bytes(b"second")
    assert identity_of(folder, known=known) == identity_of(folder) != first
    assert read[4:] == ["model.safetensors", "config.json", "model.safetensors"]
    assert [path.name for path in known.parent.iterdir()] == ["digests.json"]
    known.write_text("{")
    assert identity_of(folder, known=known) == identity_of(folder)


def test_a_cache_that_cannot_be_written_still_tells_the_identity(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "file").write_text("")
    assert identity_of(tmp_path, known=tmp_path / "file" / "digests.json") == identity_of(tmp_path)
