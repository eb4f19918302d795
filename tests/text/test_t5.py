from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel

from opensora.text.t5 import TextEncoder
from opensora.text.tiny import build_tiny_text_encoder, build_word_tokenizer, tiny_t5, tiny_t5_config

CAPTIONS = ["A red ball rolls, left.", "a blue cube falls", "a red cube"]


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return build_tiny_text_encoder(CAPTIONS, model_max_length=9, seed=1)


def test_words_are_numbered_by_frequency_after_the_special_tokens():
    tokenizer = build_word_tokenizer(CAPTIONS, model_max_length=9)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    assert vocabulary[:6] == [("<pad>", 0), ("</s>", 1), ("<unk>", 2), ("a", 3), ("cube", 4), ("red", 5)]
    assert build_word_tokenizer(reversed(CAPTIONS)).get_vocab() == tokenizer.get_vocab()
    assert len(build_word_tokenizer(CAPTIONS, max_words=2)) == 5


def test_captions_are_padded_truncated_and_ended(encoder: TextEncoder):
    ids, mask = encoder.tokenize(["A RED zebra", "", "a " * 20])
    vocabulary = encoder.tokenizer.get_vocab()
    assert ids[0].tolist() == [vocabulary["a"], vocabulary["red"], 2, 1, 0, 0, 0, 0, 0]
    assert ids[1].tolist() == [1] + [0] * 8
    assert ids[2].tolist() == [vocabulary["a"]] * 8 + [1]
    assert mask.tolist() == ids.ne(0).int().tolist()


def test_embeddings_do_not_depend_on_padding(encoder: TextEncoder):
    embeddings, mask = encoder.encode(["a red cube", "a blue cube falls left"])
    assert embeddings.shape == (2, 1, 9, 64)
    assert embeddings.shape[-1] == encoder.output_dim
    assert not embeddings.requires_grad
    short = TextEncoder(encoder.model, encoder.tokenizer, model_max_length=4)
    alone, _ = short.encode(["a red cube"])
    num_tokens = int(mask[0].sum())
    # Two layers in fp32: sums of at most 9 terms of size 1 in another order.
    torch.testing.assert_close(embeddings[0, :, :num_tokens], alone[0], atol=1e-5, rtol=1e-5)


def test_gradients_reach_every_weight(encoder: TextEncoder):
    encoder.zero_grad()
    ids, mask = encoder.tokenize(CAPTIONS)
    encoder(ids, mask).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in encoder.parameters())


def test_a_saved_folder_loads_the_same_encoder(encoder: TextEncoder, tmp_path: Path):
    encoder.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").is_file()
    assert (tmp_path / "model.safetensors").is_file()
    loaded = TextEncoder.from_pretrained(tmp_path)
    assert loaded.model_max_length == 9
    assert torch.equal(loaded.encode(CAPTIONS)[0], encoder.encode(CAPTIONS)[0])
    assert TextEncoder.from_pretrained(tmp_path, dtype=torch.bfloat16).encode(["a"])[0].dtype == torch.bfloat16
    assert TextEncoder.from_pretrained(tmp_path, model_max_length=5).encode(["a"])[0].shape[2] == 5


def test_missing_weights_are_refused_and_tied_ones_are_not_missing(encoder: TextEncoder, tmp_path: Path):
    encoder.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    state = load_file(weights)
    shared = state.pop("shared.weight")
    save_file(state | {"encoder.embed_tokens.weight": shared}, weights, metadata={"format": "pt"})
    assert torch.equal(TextEncoder.from_pretrained(tmp_path).encode(CAPTIONS)[0], encoder.encode(CAPTIONS)[0])
    absent = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    del state[absent]
    save_file(state | {"shared.weight": shared}, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"text encoder: .* must hold every weight, lacks 1: {absent}$"):
        TextEncoder.from_pretrained(tmp_path)


def test_the_seed_alone_decides_the_weights():
    state = torch.get_rng_state()
    first, second = (build_tiny_text_encoder(CAPTIONS, seed=4) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_folder_with_a_sentencepiece_model_loads(tmp_path: Path):
    """The released T5 folders hold spiece.model and no tokenizer.json."""
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS * 20),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=24,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "extra_ids": 0}')
    T5EncoderModel(tiny_t5_config(vocab_size=64)).save_pretrained(tmp_path)
    encoder = TextEncoder.from_pretrained(tmp_path, model_max_length=30)
    ids, mask = encoder.tokenize(["a red cube"])
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    assert ids[0, : int(mask.sum())].tolist() == [*pieces.encode("a red cube"), 1]
    assert encoder.encode(["a red cube"])[0].shape == (1, 1, 30, 64)


def test_bad_arguments_are_told(encoder: TextEncoder, tmp_path: Path):
    with pytest.raises(ValueError, match=r"folder must hold config\.json"):
        TextEncoder.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"folder must hold config\.json"):
        TextEncoder.from_pretrained(tmp_path / "missing")
    with pytest.raises(TypeError, match="must be a list of strings"):
        encoder.encode("a red cube")
    with pytest.raises(ValueError, match="must not have more words than the model's 3"):
        tiny_t5(tiny_t5_config(vocab_size=3), encoder.tokenizer)
    with pytest.raises(ValueError, match="model_max_length must be given"):
        TextEncoder(encoder.model, encoder.tokenizer, model_max_length=0)
