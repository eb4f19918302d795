"""STDiT: upstream's parameter names and, as laws, what Open-Sora 1.0 does in its own way."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opensora.config import STDiTConfig
from opensora.models.stdit import STDiT
from opensora.models.stdit2 import STDiT2
from opensora.presets import open_sora_v1_0, open_sora_v1_1

KEYS = Path(__file__).parent / "keys"
TINY = STDiTConfig(
    input_size=(3, 4, 6),
    in_channels=3,
    hidden_size=48,
    depth=2,
    num_heads=4,
    caption_channels=16,
    model_max_length=6,
    space_scale=0.5,
    time_scale=2 / 3,
)
MASK = torch.tensor([[False, True, True], [True, True, False]])


def tiny_model(**changes: object) -> STDiT:
    """Every layer active: the initial zeros would hide temporal attention, the text and the output."""
    torch.manual_seed(0)
    model = STDiT(replace(TINY, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.ndim > 1:
                parameter.normal_(std=0.1)
    return model.eval()


def tiny_inputs(*, frames: int = 3, rows: int = 4, columns: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(2, 3, frames, rows, columns, generator=generator),
        "timestep": torch.tensor([924.0, 100.0]),
        "y": torch.randn(2, 1, 6, 16, generator=generator),
        "mask": torch.tensor([[1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]]),
    }


def run_block(model: STDiT, frame_mask: Tensor | None = None, *, zero: bool = False, **changes: object) -> Tensor:
    """The first block on fixed tokens, at the inputs' timesteps or at 0."""
    inputs = tiny_inputs()
    timestep = torch.zeros(2) if zero else inputs["timestep"]
    text = model.embed_text(inputs["y"], inputs["mask"])
    t6 = model.t_block(model.embed_timestep(timestep, with_zero=frame_mask is not None)).unflatten(-1, (6, -1))
    x = torch.randn(2, 3, 6, 48, generator=torch.Generator().manual_seed(2))
    return model.blocks[0](x, text.tokens, text.key_lengths, t6, frame_mask, **changes)


def test_keys_and_shapes_are_those_of_the_released_checkpoints():
    for name, model_type, config in (
        ("stdit-xl-2", STDiT, open_sora_v1_0.transformer("16x256x256")),
        ("stdit2-xl-2", STDiT2, open_sora_v1_1.transformer()),
    ):
        keys = json.loads((KEYS / f"{name}.json").read_text())
        meta = keys.pop("_meta")
        with torch.device("meta"):
            model = model_type(config)
        assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == {
            name: entry["shape"] for name, entry in keys.items()
        }
        assert sum(parameter.numel() for parameter in model.parameters()) == meta["params"]


def test_presets_place_the_last_site_and_frame_of_every_clip_where_they_were_trained():
    for clip, last_site, last_frame in (("16x256x256", 30, 15), ("16x512x512", 31, 15), ("64x512x512", 31, 94.5)):
        config = replace(open_sora_v1_0.transformer(clip), hidden_size=4, num_heads=1, depth=0, caption_channels=1)
        model = STDiT(config)
        assert model.pos_embed[0, -1, 0] == pytest.approx(math.sin(last_site))
        assert model.pos_embed_temporal[0, -1, 0] == pytest.approx(math.sin(last_frame), abs=1e-6)
    with pytest.raises(ValueError, match=r"clip: must be one of 16x256x256, .* got '16x256'"):
        open_sora_v1_0.transformer("16x256")


def test_position_tables_hold_the_column_first_and_sines_before_cosines():
    model = tiny_model()
    table, row, column = model.pos_embed.unflatten(1, (2, 3))[0], 1, 2
    for k in (0, 5):
        frequency = 10000 ** (-k / 12)
        expected = [f(p / 0.5 * frequency) for p in (column, row) for f in (math.sin, math.cos)]
        torch.testing.assert_close(table[row, column, k::12], torch.tensor(expected), atol=1e-6, rtol=0)
        time = [f(2 / (2 / 3) * 10000 ** (-k / 24)) for f in (math.sin, math.cos)]
        torch.testing.assert_close(model.pos_embed_temporal[0, 2, k::24], torch.tensor(time), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(1, 4, 6), (3, 5, 7), (4, 1, 1)])
def test_output_has_the_latents_size_whatever_the_patches_and_the_stored_tables(size: tuple[int, int, int]):
    inputs = tiny_inputs(frames=size[0], rows=size[1], columns=size[2])
    out = tiny_model()(**inputs)
    assert out.shape == (2, 6, *size)
    assert out.dtype == torch.float32
    sized = tiny_model(input_size=size)(**inputs)
    torch.testing.assert_close(out, sized, atol=1e-5, rtol=1e-5)


def test_the_temporal_table_reaches_temporal_attention_alone_and_once():
    model = tiny_model()
    table = torch.randn(1, 3, 48, generator=torch.Generator().manual_seed(3))
    plain, placed = run_block(model), run_block(model, time_table_1TD=table)
    assert not torch.allclose(plain, placed, atol=1e-3)
    model.blocks[0].attn_temp.proj.weight.data.zero_()
    assert torch.equal(run_block(model), run_block(model, time_table_1TD=table))
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, arguments, output: seen.append(arguments[-1] is not None))
    model(**tiny_inputs())
    assert seen == [True, False]


def test_blocks_treat_clean_frames_as_timestep_zero_but_for_the_gate_of_temporal_attention():
    model, clean = tiny_model(), torch.zeros(2, 3, dtype=torch.bool)
    assert not torch.allclose(run_block(model, clean), run_block(model, zero=True), atol=1e-3)
    model.blocks[0].attn_temp.proj.weight.data.zero_()
    torch.testing.assert_close(run_block(model, clean), run_block(model, zero=True), atol=1e-5, rtol=1e-5)


def test_a_frame_mask_of_all_true_changes_nothing():
    model, inputs = tiny_model(), tiny_inputs()
    everywhere = torch.ones(2, 3, dtype=torch.bool)
    torch.testing.assert_close(model(**inputs, x_mask=everywhere), model(**inputs), atol=1e-5, rtol=1e-5)


def test_samples_of_a_batch_do_not_see_each_other():
    model, inputs = tiny_model(), tiny_inputs() | {"x_mask": MASK}
    alone = model(**{name: value[1:] for name, value in inputs.items()})
    torch.testing.assert_close(model(**inputs)[1:], alone, atol=1e-5, rtol=1e-5)


def test_denoiser_serves_both_captions_and_leaves_the_variance_out_unless_asked():
    model, inputs = tiny_model(), tiny_inputs()
    null = torch.randn(2, 1, 6, 16, generator=torch.Generator().manual_seed(2))
    text = torch.cat([inputs["y"], null])
    assert model.takes_frame_mask
    whole = model.denoiser(text, inputs["mask"], with_variance=True, fps=24)(inputs["x"], inputs["timestep"], MASK)
    half = model.denoiser(text, inputs["mask"])(inputs["x"], inputs["timestep"], x_mask=MASK)
    for rows, y in ((slice(0, 2), inputs["y"]), (slice(2, 4), null)):
        expected = model(**(inputs | {"y": y}), x_mask=MASK)
        torch.testing.assert_close(whole[rows], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(half[rows], expected[:, :3], atol=1e-5, rtol=1e-5)


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


def test_sampling_a_new_size_first_does_not_break_training_after():
    model, inputs = tiny_model(), tiny_inputs(frames=2)
    with torch.inference_mode():
        model(**inputs)
    model(**inputs).square().mean().backward()
    assert model.x_embedder.proj.weight.grad.any()


def test_freezing_leaves_what_it_names_trainable():
    def trainable(freeze: str | None) -> set[str]:
        model = STDiT(replace(TINY, freeze=freeze))
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    everything = trainable(None)
    assert trainable("not_temporal") == {name for name in everything if ".attn_temp." in name}
    assert trainable("text") == {name for name in everything if ".cross_attn." not in name}


def test_a_new_model_predicts_zero_and_its_frames_do_not_mix():
    torch.manual_seed(0)
    model = STDiT(TINY).eval()
    assert not model(**tiny_inputs()).any()
    together = run_block(model)
    model.blocks[0].attn_temp.qkv.weight.data.normal_()
    assert torch.equal(run_block(model), together)


def test_sizes_that_positions_cannot_have_are_refused():
    with pytest.raises(ValueError, match=r"hidden_size must be a multiple of 4 .* got 6"):
        STDiT(replace(TINY, hidden_size=6, num_heads=1))
