"""Text embeddings on disk: the encoder is loaded for new texts alone, and damaged files count as absent."""

from __future__ import annotations

import pytest
import torch

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
