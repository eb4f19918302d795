"""The text encoder beside a transformer, on paper."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
from torch import nn

from opensora.config import Preset
from opensora.estimate.paper import Affine, on_paper, peak_bytes

# Of google/t5-v1_1-xxl, which every release uses.
T5_XXL = {
    "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24, "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip


def build_text_encoder(source: str, num_layers: int | None = None) -> nn.Module:
    """The T5 encoder of a folder or hub id on meta: of the folder's config.json, else T5-XXL."""
    from transformers import T5Config, T5EncoderModel

    path = Path(source) / "config.json"
    fields = json.loads(path.read_text()) if path.is_file() else dict(T5_XXL)
    if num_layers is not None:
        fields["num_layers"] = num_layers
    with torch.device("meta"):
        return T5EncoderModel(T5Config.from_dict(fields)).eval()


def text_peak(preset: Preset, batch: int, num_tokens: int, dtype: torch.dtype) -> int:
    """Bytes that encoding captions takes beyond weights; without gradients every layer takes the same."""
    return _text_peak(preset.text_encoder, num_tokens, dtype)(batch)


@cache
def _text_peak(source: str, num_tokens: int, dtype: torch.dtype) -> Affine:
    encoder = build_text_encoder(source, num_layers=2).to(dtype)

    def peak(batch: int) -> int:
        with on_paper():
            ids = torch.empty(batch, num_tokens, dtype=torch.int64)
            return peak_bytes(lambda: encoder(input_ids=ids))

    return Affine.through(1, 2, peak(1), peak(2))
