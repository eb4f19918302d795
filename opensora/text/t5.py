"""T5 text encoders: captions to embeddings of a fixed number of tokens. B captions, L tokens, C channels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, T5EncoderModel


class TextEncoder(nn.Module):
    """A T5 encoder with its tokenizer, any size, frozen or trained.

    Args:
        model: the encoder.
        tokenizer: must have a padding token; appends its end token itself.
        model_max_length: tokens per caption (120, 200, 300 for Open-Sora 1.0, 1.1, 1.2): shorter captions are padded,
            longer ones truncated. None takes the tokenizer's.

    Captions are used as they are: clean them first (`opensora.text.cleaning`). The embedding of the empty caption used
    for guidance is not made here: it is the transformer's learnt `y_embedding`.
    Source: Open-Sora v1.2.0, opensora/models/text_encoder/t5.py.
    """

    def __init__(
        self, model: T5EncoderModel, tokenizer: PreTrainedTokenizerBase, *, model_max_length: int | None = None
    ) -> None:
        super().__init__()
        length = tokenizer.model_max_length if model_max_length is None else model_max_length
        # Tokenizers without a limit report 1e30.
        if not 1 <= length <= 1 << 20:
            raise ValueError(f"TextEncoder: model_max_length must be given where the tokenizer has none, got {length}")
        if tokenizer.pad_token_id is None:
            raise ValueError("TextEncoder: the tokenizer must have a padding token, got none")
        if len(tokenizer) > model.config.vocab_size:
            raise ValueError(
                f"TextEncoder: the tokenizer must not have more words than the model's {model.config.vocab_size}, "
                f"got {len(tokenizer)}"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.model_max_length = int(length)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        model_max_length: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> TextEncoder:
        """Load a local folder (config.json, safetensors, tokenizer files) or a hub id such as DeepFloyd/t5-v1_1-xxl.

        Errors: ValueError for a folder that is missing or has no config.json, and for weights that are missing; OSError
        for an unknown hub id.
        """
        is_folder = Path(path).is_dir() or str(path).startswith(("/", ".", "~")) or str(path).count("/") > 1
        if is_folder and not (Path(path) / "config.json").is_file():
            raise ValueError(f"text encoder: folder must hold config.json, safetensors and tokenizer files, got {path}")
        try:
            tokenizer = AutoTokenizer.from_pretrained(path)
            model, found = T5EncoderModel.from_pretrained(path, dtype=dtype, output_loading_info=True)
        except (ValueError, OSError) as error:  # transformers' own text does not say which folder
            raise type(error)(f"text encoder: {path} must hold a T5 encoder and its tokenizer: {error}") from error
        missing = sorted(found["missing_keys"])
        if missing:  # transformers draws them, and only warns; what it has tied to other weights is not among them
            names = ", ".join(missing[:12])
            raise ValueError(f"text encoder: {path} must hold every weight, lacks {len(missing)}: {names}")
        model = model.eval()
        return cls(model.to(device) if device is not None else model, tokenizer, model_max_length=model_max_length)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what `from_pretrained` reads; the tokenizer remembers `model_max_length`."""
        self.tokenizer.model_max_length = self.model_max_length
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @property
    def output_dim(self) -> int:
        """C, the transformer's `caption_channels`."""
        return self.model.config.d_model

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def tokenize(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and mask (1 token, 0 padding) of captions, both int64 (B, L) on the CPU."""
        if isinstance(captions, str):
            raise TypeError(f"captions: must be a list of strings, got the string {captions!r}")
        tokens = self.tokenizer(
            list(captions),
            max_length=self.model_max_length,
            padding="max_length",
            truncation=True,
            return_attention_mask=True,
            add_special_tokens=True,
            return_tensors="pt",
        )
        return tokens["input_ids"], tokens["attention_mask"]

    def forward(self, input_ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Embeddings (B, 1, L, C) of token ids, with gradients; the 1 is an axis that the transformers expect."""
        input_ids_BL, mask_BL = input_ids_BL.to(self.device), mask_BL.to(self.device)
        return self.model(input_ids=input_ids_BL, attention_mask=mask_BL).last_hidden_state[:, None]

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embeddings (B, 1, L, C) in the encoder's dtype and mask int64 (B, L) of captions, on its device.

        Embeddings of padding are returned as they come out of the encoder; the mask says which they are.
        """
        input_ids_BL, mask_BL = self.tokenize(captions)
        return self(input_ids_BL, mask_BL), mask_BL.to(self.device)
