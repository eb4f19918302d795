"""STDiT3: upstream's parameter names and, as laws, what its inputs may and may not change."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opensora.config import STDiT3Config
from opensora.models.layers import RotaryEmbedding, SelfAttention, select_tokens
from opensora.models.stdit3 import STDiT3

KEYS = Path(__file__).parent / "keys" / "stdit3-xl-2.json"
NUM_RELEASED_PARAMETERS = 1_207_643_972
TINY = STDiT3Config(
    hidden_size=48, depth=2, num_heads=4, caption_channels=16, model_max_length=6, in_channels=3, input_sq_size=64
)


def tiny_model(**changes: object) -> STDiT3:
    """Every layer active: upstream's initial zeros would hide the temporal blocks and the frame rate."""
    torch.manual_seed(0)
    model = STDiT3(replace(TINY, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.ndim > 1:
                parameter.normal_(std=0.1)
    return model.eval()


def tiny_inputs(batch: int = 2, *, frames: int = 3, rows: int = 4, columns: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.arange(batch) % 3 + 2
    return {
        "x": torch.randn(batch, 3, frames, rows, columns, generator=generator),
        "timestep": torch.linspace(924.3, 100.0, batch),
        "y": torch.randn(batch, 1, 6, 16, generator=generator),
        "mask": (torch.arange(6) < lengths[:, None]).long(),
        "fps": torch.full((batch,), 24.0),
        "height": torch.full((batch,), 32.0),
        "width": torch.full((batch,), 48.0),
    }


def largest(difference: Tensor) -> float:
    return float(difference.detach().abs().max())


def test_keys_and_shapes_are_those_of_the_released_checkpoint():
    with torch.device("meta"):
        model = STDiT3(STDiT3Config())
    released = {name: entry["shape"] for name, entry in json.loads(KEYS.read_text()).items() if name != "_meta"}
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == released
    assert sum(parameter.numel() for parameter in model.parameters()) == NUM_RELEASED_PARAMETERS


@pytest.mark.parametrize("size", [(1, 4, 6), (3, 5, 7), (4, 1, 1)])
def test_output_has_the_latents_size_whatever_the_patches(size):
    inputs = tiny_inputs(frames=size[0], rows=size[1], columns=size[2])
    out = tiny_model()(**inputs)
    assert out.shape == (2, 6, *size)
    assert out.dtype == torch.float32
    assert out.isfinite().all()


def test_without_variance_the_first_half_of_the_output_is_returned():
    model, inputs = tiny_model(), tiny_inputs()
    # The same dot products in a smaller matrix: equal up to the order of 48 sums.
    torch.testing.assert_close(model(**inputs, with_variance=False), model(**inputs)[:, :3], atol=1e-5, rtol=1e-5)


def test_prepared_text_gives_the_same_numbers_as_plain_text():
    model, inputs = tiny_model(), tiny_inputs()
    expected = model(**inputs)
    inputs["y"] = model.prepare_text(inputs["y"], inputs.pop("mask"))
    assert torch.equal(model(**inputs), expected)


def test_denoiser_shares_latents_between_conditional_and_null_text():
    model, inputs = tiny_model(), tiny_inputs()
    x_mask = torch.tensor([[True, False, True], [True, True, True]])
    null = torch.randn(2, 1, 6, 16, generator=torch.Generator().manual_seed(2))
    text = torch.cat([inputs["y"], null])
    constant = {name: inputs[name] for name in ("fps", "height", "width")}
    velocity = model.denoiser(text, inputs["mask"], **constant)(inputs["x"], inputs["timestep"], x_mask)
    for rows, y in ((slice(0, 2), inputs["y"]), (slice(2, 4), null)):
        expected = model(**(inputs | {"y": y}), x_mask=x_mask)[:, :3]
        torch.testing.assert_close(velocity[rows], expected, atol=1e-5, rtol=1e-5)


def test_text_beyond_the_mask_does_not_matter_and_its_order_neither():
    model, inputs = tiny_model(), tiny_inputs()
    expected = model(**inputs)
    hidden = inputs["mask"][:, None, :, None] == 0
    assert torch.equal(model(**(inputs | {"y": inputs["y"].masked_fill(hidden, 7.0)})), expected)
    moved = inputs | {"y": inputs["y"].flip(2), "mask": inputs["mask"].flip(1)}
    torch.testing.assert_close(model(**moved), expected, atol=1e-5, rtol=1e-5)


def test_samples_of_a_batch_do_not_see_each_other():
    model, inputs = tiny_model(), tiny_inputs()
    alone = model(**{name: value[1:] for name, value in inputs.items()})
    torch.testing.assert_close(model(**inputs)[1:], alone, atol=1e-5, rtol=1e-5)


def test_sample_0_sizes_the_picture_of_all_and_each_has_its_own_frame_rate():
    model, inputs = tiny_model(), tiny_inputs()
    expected = model(**inputs)
    for name in ("height", "width"):
        value = inputs[name]
        assert torch.equal(model(**(inputs | {name: torch.stack([value[0], 3 * value[1]])})), expected)
        assert not torch.allclose(model(**(inputs | {name: torch.stack([3 * value[0], value[1]])}))[1], expected[1])
    out = model(**(inputs | {"fps": torch.tensor([24.0, 8.0])}))
    torch.testing.assert_close(out[0], expected[0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(out[1], expected[1], atol=1e-3)


def test_a_frame_mask_of_all_true_changes_nothing():
    model, inputs = tiny_model(), tiny_inputs()
    everywhere = torch.ones(2, 3, dtype=torch.bool)
    torch.testing.assert_close(model(**inputs, x_mask=everywhere), model(**inputs), atol=1e-5, rtol=1e-5)


def test_masked_frames_of_the_final_layer_are_normalised_twice():
    layer = tiny_model().final_layer
    x, t = torch.randn(1, 6, 48), torch.randn(2, 1, 48)
    shift, scale = (layer.scale_shift_table + t[:, :, None]).unbind(2)
    once = torch.layer_norm(x, (48,), eps=1e-6) * (1 + scale[0]) + shift[0]
    twice = torch.layer_norm(once, (48,), eps=1e-6) * (1 + scale[1]) + shift[1]
    out = layer(x, t, torch.tensor([[True, False]]))
    torch.testing.assert_close(out[:, :3], layer.linear(once[:, :3]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out[:, 3:], layer.linear(twice[:, 3:]), atol=1e-5, rtol=1e-5)


def test_temporal_attention_is_spatial_attention_with_the_axes_exchanged():
    torch.manual_seed(0)
    time = SelfAttention(24, 2, axis="time", qk_norm=True)
    space = SelfAttention(24, 2, axis="space", qk_norm=True)
    space.load_state_dict(time.state_dict())
    x, rope = torch.randn(2, 3, 5, 24), RotaryEmbedding(12)(3)
    expected = space(x.transpose(1, 2), rope).transpose(1, 2)
    torch.testing.assert_close(time(x, rope), expected, atol=1e-6, rtol=1e-5)


def test_attention_without_qk_norm_has_no_norm_weights():
    model = tiny_model(qk_norm=False)
    assert not any("q_norm" in name for name in model.state_dict())
    assert model(**tiny_inputs()).isfinite().all()


def test_bf16_weights_and_autocast_stay_near_fp32():
    inputs = tiny_inputs()
    expected = tiny_model()(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = tiny_model()(**inputs)
    half = tiny_model().to(torch.bfloat16)(**inputs)
    assert mixed.dtype == half.dtype == torch.float32
    # bf16 has 8 bits: 2^-8 per rounding, some 20 roundings in a chain of 4 blocks, in units of the output's scale.
    limit = 20 * 2**-8 * largest(expected)
    assert largest(mixed - expected) < limit
    assert largest(half - expected) < limit


def test_rope_angles_follow_the_weights_dtype_only_when_exact():
    exact, ours = RotaryEmbedding(72), RotaryEmbedding(72, exact_dtype=False)
    truth = exact(120).cos
    assert torch.equal(ours.to(torch.bfloat16)(120).cos, truth)
    rounded = exact.to(torch.bfloat16)(120)
    assert rounded.cos.dtype == torch.bfloat16
    assert largest(rounded.cos.float() - truth) > 0.1


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for is_checkpointed in (False, True):
        model = tiny_model(class_dropout_prob=0.0).train()
        model.set_gradient_checkpointing(is_checkpointed)
        model(**tiny_inputs()).square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(plain, again) for plain, again in zip(*gradients, strict=True))


def test_caption_dropout_replaces_whole_captions_and_obeys_its_generator():
    embedder = tiny_model(class_dropout_prob=0.5).y_embedder.train()
    y = tiny_inputs(64)["y"]
    first, again = (embedder(y, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)
    null = embedder.y_proj(embedder.y_embedding)
    is_null = (first[:, 0] - null).abs().amax(dim=(1, 2)) < 1e-5
    assert 16 < int(is_null.sum()) < 48
    torch.testing.assert_close(first[~is_null], embedder.y_proj(y[~is_null]), atol=1e-5, rtol=1e-5)


def test_caption_dropout_of_everything_makes_text_irrelevant():
    model, inputs = tiny_model(class_dropout_prob=1.0).train(), tiny_inputs()
    assert torch.equal(model(**inputs), model(**(inputs | {"y": inputs["y"] + 1})))


def test_freezing_leaves_only_the_named_parts_trainable():
    names = [name for name, p in STDiT3(replace(TINY, only_train_temporal=True)).named_parameters() if p.requires_grad]
    assert names
    assert all(name.startswith("temporal_blocks.") for name in names)
    frozen = STDiT3(replace(TINY, freeze_y_embedder=True))
    names = {name for name, p in frozen.named_parameters() if not p.requires_grad}
    assert names == {"rope.freqs", *(f"y_embedder.y_proj.fc{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias"))}


def test_temporal_blocks_start_without_effect():
    block = STDiT3(TINY).temporal_blocks[0].eval()
    x, text, t6 = torch.randn(2, 3, 6, 48), torch.randn(2, 4, 48), torch.randn(1, 2, 6, 48)
    assert torch.equal(block(x, text, None, t6), x)


def test_packed_text_with_lengths_equals_masked_text():
    model, inputs = tiny_model(), tiny_inputs()
    expected = model(**inputs)
    embedded = model.y_embedder(inputs["y"]).squeeze(1)
    packed = embedded[inputs["mask"] != 0][None]
    skipping = tiny_model(skip_y_embedder=True)
    skipping.load_state_dict(model.state_dict())
    out = skipping(**(inputs | {"y": packed, "mask": inputs["mask"].sum(dim=1)}))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_selected_tokens_come_first_and_keep_their_order():
    y = torch.arange(8.0).view(2, 4, 1)
    text = select_tokens(y, torch.tensor([[0, 1, 0, 1], [1, 0, 0, 0]]))
    assert text.tokens[0, :, 0].tolist() == [1.0, 3.0]
    assert float(text.tokens[1, 0, 0]) == 4.0
    assert text.key_lengths.tolist() == [2, 1]


def test_sampling_first_does_not_break_training_after():
    model, inputs = tiny_model(), tiny_inputs()
    with torch.inference_mode():
        model(**inputs)
    model.train()(**inputs).mean().backward()


def test_missing_sizes_and_unfit_masks_are_refused():
    model, inputs = tiny_model(), tiny_inputs()
    with pytest.raises(ValueError, match="fps, height, width are required, got no fps"):
        model(**(inputs | {"fps": None}))
    with pytest.raises(ValueError, match="mask must have shape"):
        model(**(inputs | {"mask": torch.ones(2, 5)}))
