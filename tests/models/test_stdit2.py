"""STDiT2: upstream's parameter names and, as laws, what Open-Sora 1.1 does in its own way."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opensora.config import STDiT2Config
from opensora.config_files import config_from_dict
from opensora.models.layers import RotaryEmbedding, thinned
from opensora.models.stdit2 import STDiT2

KEYS = Path(__file__).parent / "keys" / "stdit2-xl-2.json"
TINY = STDiT2Config(
    input_sq_size=64,
    in_channels=3,
    hidden_size=48,
    depth=2,
    num_heads=4,
    caption_channels=16,
    model_max_length=6,
    qk_norm=True,
    qk_norm_legacy=True,
)
MASK = torch.tensor([[False, True, True], [True, True, False]])


def tiny_model(**changes: object) -> STDiT2:
    """Every layer active: the initial zeros would hide temporal attention, the text and the output."""
    torch.manual_seed(0)
    model = STDiT2(replace(TINY, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.ndim > 1:
                parameter.normal_(std=0.1)
    return model.eval()


def tiny_inputs(*, frames: int = 3, rows: int = 4, columns: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(2, 3, frames, rows, columns, generator=generator),
        "timestep": torch.tensor([924.3, 100.0]),
        "y": torch.randn(2, 1, 6, 16, generator=generator),
        "mask": torch.tensor([[1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]]),
        "num_frames": torch.tensor([16.0, 12.0]),
        "height": torch.tensor([32.0, 32.0]),
        "width": torch.tensor([48.0, 48.0]),
        "ar": torch.tensor([32 / 48, 32 / 48]),
        "fps": torch.tensor([24.0, 8.0]),
    }


def clip_of(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: inputs[name] for name in ("num_frames", "height", "width", "ar", "fps")}


def conditions(model: STDiT2, **changes: Tensor) -> dict[str, Tensor]:
    inputs = tiny_inputs() | changes
    return model.embed_conditions(inputs["timestep"], clip_of(inputs), with_zero=True)._asdict()


def test_keys_and_shapes_are_those_of_the_released_checkpoint():
    keys = json.loads(KEYS.read_text())
    meta = keys.pop("_meta")
    with torch.device("meta"):
        model = STDiT2(config_from_dict(STDiT2Config, meta["config"]))
    released = {name: entry["shape"] for name, entry in keys.items()}
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == released
    assert sum(parameter.numel() for parameter in model.parameters()) == meta["params"]


@pytest.mark.parametrize("size", [(1, 4, 6), (3, 5, 7), (4, 1, 1)])
def test_output_has_the_latents_size_whatever_the_patches(size: tuple[int, int, int]):
    out = tiny_model()(**tiny_inputs(frames=size[0], rows=size[1], columns=size[2]))
    assert out.shape == (2, 6, *size)
    assert out.dtype == torch.float32
    assert out.isfinite().all()


def test_rotating_before_the_norm_matters_only_when_its_weights_are_uneven():
    legacy, model = tiny_model(), tiny_model(qk_norm_legacy=False)
    inputs = tiny_inputs()
    # A rotation keeps the mean square, so equal weights commute with it.
    torch.testing.assert_close(legacy(**inputs), model(**inputs), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        for both in (legacy, model):
            for block in both.blocks:
                block.attn_temp.q_norm.weight.copy_(torch.linspace(0.1, 3.0, 12))
    assert float((legacy(**inputs) - model(**inputs)).detach().abs().max()) > 1e-2


@pytest.mark.parametrize("legacy", [False, True])
def test_temporal_attention_sees_how_far_apart_frames_are_and_not_where(legacy: bool):
    attention = tiny_model(qk_norm_legacy=legacy).blocks[0].attn_temp
    x, table = torch.randn(1, 3, 2, 48, generator=torch.Generator().manual_seed(2)), RotaryEmbedding(12)(8)
    early, late = (attention(x, type(table)(table.cos[i : i + 3], table.sin[i : i + 3])) for i in (0, 5))
    torch.testing.assert_close(early, late, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(early, attention(x), atol=1e-3)


def test_picture_size_goes_to_the_spatial_half_and_clip_length_to_temporal_attention():
    model = tiny_model()
    before = conditions(model)
    for name in ("height", "width", "ar"):
        after = conditions(model, **{name: tiny_inputs()[name] * 2})
        assert not torch.equal(after["space_GB6D"], before["space_GB6D"]), name
        assert torch.equal(after["time_GB3D"], before["time_GB3D"]), name
    for name in ("num_frames", "fps"):
        after = conditions(model, **{name: tiny_inputs()[name] * 2})
        assert not torch.equal(after["time_GB3D"], before["time_GB3D"]), name
        assert torch.equal(after["space_GB6D"], before["space_GB6D"]), name
        assert torch.equal(after["final_GBD"], before["final_GBD"]), name


def test_final_layer_reads_the_picture_size_only_for_clean_frames():
    model, inputs = tiny_model(), tiny_inputs()
    own, zero = conditions(model)["final_GBD"]
    size = torch.cat(
        [
            model.csize_embedder(torch.stack([inputs["height"], inputs["width"]], dim=1)),
            model.ar_embedder(inputs["ar"]),
        ],
        dim=1,
    )
    torch.testing.assert_close(own, model.t_embedder(inputs["timestep"]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(zero, model.t_embedder(torch.zeros(2)) + size, atol=1e-5, rtol=1e-5)


def test_blocks_treat_clean_frames_as_timestep_zero():
    model, inputs = tiny_model(), tiny_inputs()
    block, x = model.blocks[0], torch.randn(2, 3, 6, 48, generator=torch.Generator().manual_seed(2))
    text, rope = model.embed_text(inputs["y"], inputs["mask"]), model.rope(3)
    masked = model.embed_conditions(inputs["timestep"], clip_of(inputs), with_zero=True)
    zero = model.embed_conditions(torch.zeros(2), clip_of(inputs), with_zero=False)
    clean = block(x, text.tokens, text.key_lengths, masked, torch.zeros(2, 3, dtype=torch.bool), rope)
    torch.testing.assert_close(clean, block(x, text.tokens, text.key_lengths, zero, None, rope), atol=1e-5, rtol=1e-5)


def test_a_frame_mask_of_all_true_changes_nothing():
    model, inputs = tiny_model(), tiny_inputs()
    everywhere = torch.ones(2, 3, dtype=torch.bool)
    torch.testing.assert_close(model(**inputs, x_mask=everywhere), model(**inputs), atol=1e-5, rtol=1e-5)


def test_samples_of_a_batch_do_not_see_each_other():
    model, inputs = tiny_model(), tiny_inputs() | {"x_mask": MASK}
    alone = model(**{name: value[1:] for name, value in inputs.items()})
    torch.testing.assert_close(model(**inputs)[1:], alone, atol=1e-5, rtol=1e-5)


def test_prepared_text_serves_conditional_and_null_captions_at_once():
    model, inputs = tiny_model(), tiny_inputs() | {"x_mask": MASK}
    null = torch.randn(2, 1, 6, 16, generator=torch.Generator().manual_seed(2))
    text = model.prepare_text(torch.cat([inputs["y"], null]), inputs["mask"])
    out = model(**(inputs | {"y": text, "mask": None}))
    for rows, y in ((slice(0, 2), inputs["y"]), (slice(2, 4), null)):
        torch.testing.assert_close(out[rows], model(**(inputs | {"y": y})), atol=1e-5, rtol=1e-5)


def test_denoiser_gives_the_noise_of_a_forward_and_the_variance_where_asked():
    model, inputs = tiny_model(), tiny_inputs()
    assert model.takes_frame_mask
    expected = model(**inputs, x_mask=MASK)
    for with_variance, channels in ((False, 3), (True, 6)):
        denoise = model.denoiser(inputs["y"], inputs["mask"], with_variance=with_variance, **clip_of(inputs))
        out = denoise(inputs["x"], inputs["timestep"], MASK)
        torch.testing.assert_close(out, expected[:, :channels], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"are required, got no height, width, ar, fps$"):
        model.denoiser(inputs["y"], num_frames=inputs["num_frames"])


def test_bf16_weights_and_autocast_stay_near_fp32():
    inputs = tiny_inputs() | {"x_mask": MASK}
    expected = tiny_model()(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = tiny_model()(**inputs)
    half = tiny_model().to(torch.bfloat16)(**inputs)
    assert mixed.dtype == half.dtype == torch.float32
    # bf16 has 8 bits: 2^-8 per rounding, some 20 roundings in a chain of 2 blocks, in units of the output's scale.
    limit = 20 * 2**-8 * float(expected.detach().abs().max())
    assert float((mixed - expected).detach().abs().max()) < limit
    assert float((half - expected).detach().abs().max()) < limit


def test_gradients_reach_every_parameter_and_checkpointing_keeps_them():
    gradients = []
    for is_checkpointed in (False, True):
        model = tiny_model(class_dropout_prob=0.0).train()
        model.set_gradient_checkpointing(is_checkpointed)
        model(**tiny_inputs(), x_mask=MASK).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(grad is not None and grad.any() for grad in gradients[0].values())
    assert all(torch.equal(grad, gradients[1][name]) for name, grad in gradients[0].items())


def test_drop_path_leaves_out_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    (gate,) = thinned((torch.ones(4000, 3),), 0.25)
    assert torch.equal(gate, gate[:, :1].expand(-1, 3))
    assert gate.unique().tolist() == pytest.approx([0, 4 / 3])
    assert float(gate.mean()) == pytest.approx(1, abs=0.04)  # 4 standard errors of sqrt(1/3 / 4000)
    assert thinned((gate,), 0.0)[0] is gate


def test_freezing_leaves_what_it_names_trainable():
    def trainable(freeze: str | None) -> set[str]:
        model = STDiT2(replace(TINY, freeze=freeze))
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    everything = trainable(None)
    assert trainable("not_temporal") == {name for name in everything if ".attn_temp." in name}
    assert trainable("text") == {name for name in everything if ".cross_attn." not in name}


def test_a_new_model_predicts_zero_and_its_frames_do_not_mix():
    torch.manual_seed(0)
    model, inputs = STDiT2(TINY).eval(), tiny_inputs()
    assert not model(**inputs).any()
    x, text = torch.randn(2, 3, 6, 48), torch.randn(2, 4, 48)
    arguments = (text, None, model.embed_conditions(inputs["timestep"], clip_of(inputs), with_zero=False), None)
    together = model.blocks[0](x, *arguments, model.rope(3))
    alone = model.blocks[0](x[:, 1:2], *arguments, model.rope(1))
    torch.testing.assert_close(together[:, 1:2], alone, atol=1e-5, rtol=1e-5)


def test_missing_numbers_and_unfit_sizes_are_refused():
    with pytest.raises(ValueError, match=r"are required, got no num_frames, ar$"):
        tiny_model()(**(tiny_inputs() | {"num_frames": None, "ar": None}))
    with pytest.raises(ValueError, match="hidden_size must be a multiple of 3"):
        STDiT2(replace(TINY, hidden_size=32))
