"""A T5 encoder small enough to be trained together with a small transformer, with a vocabulary made from captions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from opensora.text.t5 import TextEncoder

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"


def build_word_tokenizer(
    captions: Iterable[str], *, model_max_length: int = 32, max_words: int | None = None
) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the lower-cased words and punctuation marks of `captions`, commonest first.

    Ids 0, 1, 2 are <pad>, </s> (appended to every caption) and <unk> (any other word).
    """
    normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    splitter = pre_tokenizers.BertPreTokenizer()
    counts = Counter(
        word for caption in captions for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(caption))
    )
    # Ties in alphabetical order: the same captions in any order give the same ids.
    words = sorted(counts, key=lambda word: (-counts[word], word))[:max_words]
    vocabulary = {word: number for number, word in enumerate([PAD, END, UNKNOWN, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[(END, vocabulary[END])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        model_max_length=model_max_length,
    )


def tiny_t5_config(vocab_size: int) -> T5Config:
    """T5 v1.1 (gated GELU) in the size of a toy: 2 layers of 64 channels, about 0.1 M weights plus the vocabulary."""
    return T5Config(
        vocab_size=vocab_size,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        is_encoder_decoder=False,
        use_cache=False,
        pad_token_id=0,
        eos_token_id=1,
    )


def tiny_t5(
    config: T5Config, tokenizer: PreTrainedTokenizerFast, *, seed: int = 0, model_max_length: int | None = None
) -> TextEncoder:
    """A randomly initialised encoder; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = T5EncoderModel(config)
    return TextEncoder(model, tokenizer, model_max_length=model_max_length)


def build_tiny_text_encoder(captions: Iterable[str], *, model_max_length: int = 32, seed: int = 0) -> TextEncoder:
    """The untrained encoder of a small training run: vocabulary from its captions, weights from `seed`."""
    tokenizer = build_word_tokenizer(captions, model_max_length=model_max_length)
    return tiny_t5(tiny_t5_config(len(tokenizer)), tokenizer, seed=seed)
