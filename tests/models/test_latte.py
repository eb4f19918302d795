"""LatteT2V: upstream's parameter names and, as laws, what its inputs may and may not change."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from opensora.config import LatteT2VConfig
from opensora.config_files import config_from_dict
from opensora.models.latte import LatteT2V
from opensora.models.latte_layers import SelfAttention
from opensora.models.latte_positions import LattePositions
from opensora.models.patches import Sites
from opensora.presets import open_sora_plan_v1_0, open_sora_plan_v1_1

KEYS = Path(__file__).parent / "keys" / "latte-t2v-xl.json"
SIZES = {
    "1.0": open_sora_plan_v1_0.transformer(),
    "1.1": open_sora_plan_v1_1.transformer("221x512x512"),
    "D64": LatteT2VConfig(num_attention_heads=18, attention_head_dim=64),
}
TINY = LatteT2VConfig(
    num_attention_heads=2,
    attention_head_dim=8,
    num_layers=2,
    cross_attention_dim=16,
    sample_size=(8, 8),
    caption_channels=12,
    video_length=3,
)


def tiny_model(**changes: Any) -> LatteT2V:
    """With weights large enough for every layer to show in the output."""
    torch.manual_seed(0)
    model = LatteT2V(replace(TINY, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval()


def tiny_inputs(*, frames: int = 3, images: int = 0, rows: int = 8, columns: int = 4) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    texts = (2, 1 + images, 6) if images else (2, 6)
    mask = torch.randint(0, 2, texts, generator=generator)
    mask[..., 0] = 1
    return {
        "hidden_states": torch.randn(2, 4, frames + images, rows, columns, generator=generator),
        "timestep": torch.tensor([7, 901]),
        "encoder_hidden_states": torch.randn(*texts, 12, generator=generator),
        "encoder_attention_mask": mask,
        "use_image_num": images,
    }


def padding(*, frames: int = 3) -> Tensor:
    """Sample 0 has picture in its first 4 x 4 latents, sample 1 in 2 x 2 of its first frame; so both frames beyond it
    are empty."""
    mask = torch.zeros(2, frames, 8, 4)
    mask[0, :, :4, :4] = 1
    mask[1, 0, :2, :2] = 1
    return mask


def largest(x: Tensor) -> float:
    return float(x.detach().abs().max())


def assert_near(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", SIZES)
def test_keys_and_shapes_are_those_of_the_released_checkpoints(name: str):
    with torch.device("meta"):
        model = LatteT2V(SIZES[name])
    state = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    assert state == json.loads(KEYS.read_text())
    assert len(state) == 968
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == 1_057_738_400


def test_compressed_keys_have_weights_in_the_second_half_of_the_layers():
    added = set(tiny_model(compress_kv_factor=2, num_layers=3).state_dict()) - set(
        tiny_model(num_layers=3).state_dict()
    )
    kinds = [f"attn1.{part}.{kind}" for part in ("sr", "norm") for kind in ("weight", "bias")]
    blocks = [f"{half}.{layer}" for half in ("transformer_blocks", "temporal_transformer_blocks") for layer in (1, 2)]
    assert added == {f"{block}.{kind}" for block in blocks for kind in kinds}


@torch.no_grad()
def test_new_compressions_take_means_of_patches_and_of_frames_after_a_repeated_first_one():
    x = torch.randn(2, 3, 8, 16, generator=torch.Generator().manual_seed(1))
    space, time = (SelfAttention(TINY, axis, 2) for axis in ("space", "time"))
    means = torch.nn.functional.avg_pool2d(x.flatten(0, 1).unflatten(1, (4, 2)).permute(0, 3, 1, 2), 2)
    assert_near(space._compressed(x, Sites(4, 2)).flatten(0, 1), means.flatten(2).transpose(1, 2))
    assert_near(time._compressed(x, Sites(4, 2)), torch.stack([x[:, 0], x[:, 1:].mean(1)], dim=1))
    assert_near(time._compressed(x[:, 1:], Sites(4, 2)), x[:, 1:].mean(1, keepdim=True))
    model = tiny_model(compress_kv_factor=4, video_length=2)
    with pytest.raises(ValueError, match="an odd number of frames or at least 4, the factor of compressed keys, got 2"):
        model(**tiny_inputs(frames=2, columns=8))


@pytest.mark.parametrize(
    ("version", "video_length", "scale"),
    [("1.0", 17, 3), ("1.0", 5, 1), ("1.0", 4, 1), ("1.1", 17, 1), ("1.1", 56, 3), ("1.1", 129, 8), ("1.1", 3, 1)],
)
def test_positions_of_frames_are_scaled_as_the_version_says(version: Any, video_length: int, scale: int):
    config = replace(TINY, version=version, video_length=video_length)
    table = LattePositions(config).in_time(torch.empty(0))[0, :, 0]
    angles = torch.arange(video_length)[:, None] / scale / 10000 ** (torch.arange(8) / 8)
    assert_near(table, torch.cat([angles.sin(), angles.cos()], dim=1))


def test_a_released_configuration_tells_its_version():
    released = {"_class_name": "LatteT2V", "_diffusers_version": "0.27.2", "video_length": 17, "sample_size": [64, 64]}
    assert config_from_dict(LatteT2VConfig, released) == open_sora_plan_v1_0.transformer()
    assert config_from_dict(LatteT2VConfig, {**released, "use_rope": False}) == open_sora_plan_v1_1.transformer()
    assert config_from_dict(LatteT2VConfig, {**released, "version": "1.1"}) == open_sora_plan_v1_1.transformer()


def test_coordinates_of_any_grid_reach_as_far_as_those_of_the_sample_size():
    positions, like = LattePositions(TINY), torch.empty(0)
    native, finer, wide = (positions.in_space(*grid, like)[0, 0] for grid in ((4, 4), (8, 8), (4, 8)))
    assert_near(finer.view(8, 8, 16)[::2, ::2], native.view(4, 4, 16))
    assert_near(wide.view(4, 8, 16)[:, ::2], native.view(4, 4, 16))
    oblong = LattePositions(replace(TINY, sample_size=(8, 4)))
    assert_near(oblong.in_space(4, 4, like)[0, 0], native)


def test_rotations_of_neighbours_that_share_a_scaled_position_are_equal():
    table = LattePositions(replace(TINY, video_length=33)).rotation_in_time(6, torch.device("cpu"))
    assert torch.equal(table.cos[0::2], table.cos[1::2])
    assert not torch.equal(table.sin[0], table.sin[2])


@pytest.mark.parametrize("size", [(3, 8, 8), (3, 6, 10), (3, 2, 2), (1, 4, 2)])
@pytest.mark.parametrize("changes", [{}, {"use_rope": True}, {"compress_kv_factor": 2}], ids=["plain", "rope", "thin"])
def test_output_has_the_latents_size_and_is_fp32(size: tuple[int, int, int], changes: dict[str, Any]):
    if changes == {"compress_kv_factor": 2} and min(size[1:]) < 4:
        pytest.skip("too few patches to be compressed")
    frames, rows, columns = size
    with torch.no_grad():
        out = tiny_model(video_length=frames, **changes)(**tiny_inputs(frames=frames, rows=rows, columns=columns))
    assert out.shape == (2, 8, *size)
    assert out.dtype == torch.float32
    assert out.isfinite().all()


@torch.no_grad()
def test_samples_of_a_batch_do_not_see_each_other():
    model, inputs = tiny_model(), tiny_inputs(images=2)
    inputs["attention_mask"] = padding(frames=5)
    alone = model(**{name: value[1:] if isinstance(value, Tensor) else value for name, value in inputs.items()})
    assert_near(model(**inputs)[1:], alone)


@torch.no_grad()
def test_frames_see_each_other_through_temporal_attention_alone():
    model, inputs = tiny_model(), tiny_inputs()
    moved = inputs | {"hidden_states": inputs["hidden_states"].clone()}
    moved["hidden_states"][:, :, 1] += 1
    together, changed = (model(**each, enable_temporal_attentions=False) for each in (inputs, moved))
    assert torch.equal(together[:, :, [0, 2]], changed[:, :, [0, 2]])
    image = inputs | {"hidden_states": inputs["hidden_states"][:, :, 1:2]}
    assert_near(model(**image, enable_temporal_attentions=False), together[:, :, 1:2])
    assert largest(model(**inputs)[:, :, 0] - model(**moved)[:, :, 0]) > 1e-3


@torch.no_grad()
def test_images_beside_a_clip_change_neither_the_clip_nor_each_other():
    model, inputs = tiny_model(), tiny_inputs(images=2)
    inputs["attention_mask"] = padding(frames=5)
    out = model(**inputs)
    names = ("hidden_states", "encoder_hidden_states", "encoder_attention_mask", "attention_mask")
    x, text, text_mask, mask = (inputs[name] for name in names)

    def alone(frames: slice, index: int) -> dict[str, Any]:
        values = (x[:, :, frames], text[:, index], text_mask[:, index], mask[:, frames])
        return {"timestep": inputs["timestep"], **dict(zip(names, values, strict=True))}

    assert_near(out[:, :, :3], model(**alone(slice(0, 3), 0)))
    for i in (0, 1):
        image = model(**alone(slice(3 + i, 4 + i), 1 + i), enable_temporal_attentions=False)
        assert_near(out[:, :, 3 + i : 4 + i], image)


def test_training_with_images_places_frames_only_with_checkpointing():
    model, inputs = tiny_model(), tiny_inputs(images=2)
    expected = model(**inputs)
    model.train().set_gradient_checkpointing()
    assert_near(model(**inputs), expected)
    model.set_gradient_checkpointing(False)
    unplaced = model(**inputs)
    assert largest(unplaced[:, :, :3] - expected[:, :, :3]) > 1e-3
    assert_near(unplaced[:, :, 3:], expected[:, :, 3:])
    assert_near(model(**tiny_inputs()), model.eval()(**tiny_inputs()))


@torch.no_grad()
def test_text_that_is_masked_does_not_matter_unless_all_is():
    model, inputs = tiny_model(), tiny_inputs()
    hidden = inputs["encoder_attention_mask"][..., None] == 0
    changed = inputs | {"encoder_hidden_states": inputs["encoder_hidden_states"].masked_fill(hidden, 7.0)}
    assert hidden.any()
    assert torch.equal(model(**changed), model(**inputs))
    everything, nothing = (inputs | {"encoder_attention_mask": make(2, 6)} for make in (torch.ones, torch.zeros))
    assert_near(model(**nothing), model(**everything))
    assert_near(model(**(inputs | {"encoder_attention_mask": None})), model(**everything))


@torch.no_grad()
@pytest.mark.parametrize("compress", [1, 2])
def test_padding_does_not_reach_the_picture(compress: int):
    model, inputs = tiny_model(compress_kv_factor=compress), tiny_inputs()
    mask = padding()
    changed = inputs | {"hidden_states": torch.where(mask[:, None] == 0, 3.0, inputs["hidden_states"])}
    before, after = (model(**each, attention_mask=mask) for each in (inputs, changed))
    # Sample 1 has frames without picture, which temporal attention mixes into its first, as upstream's does. A mask
    # of 4 x 4 latents covers a compressed patch exactly.
    assert_near(before[0, :, :, :4], after[0, :, :, :4])
    assert largest(before[0, :, :, 4:] - after[0, :, :, 4:]) > 1e-3
    alone = ({**each, "enable_temporal_attentions": False, "attention_mask": mask} for each in (inputs, changed))
    if compress == 1:
        assert_near(*(model(**each)[1, :, 0, :2, :2] for each in alone))
    assert_near(model(**inputs, attention_mask=torch.ones_like(mask)), model(**inputs))


@torch.no_grad()
def test_a_mask_of_patches_in_version_1_0_is_that_of_latents_in_1_1():
    mask, inputs = padding(), tiny_inputs()
    patches = torch.nn.functional.max_pool2d(mask, 2).flatten(2).flatten(0, 1)
    # At 3 frames both versions have the same positions.
    assert_near(
        tiny_model(version="1.0")(**inputs, attention_mask=patches), tiny_model()(**inputs, attention_mask=mask)
    )


@pytest.mark.parametrize("changes", [{}, {"compress_kv_factor": 2}, {"use_rope": True}], ids=["plain", "thin", "rope"])
def test_gradients_reach_every_parameter_and_checkpointing_keeps_them(changes: dict[str, Any]):
    gradients = []
    for is_checkpointed in (False, True):
        model = tiny_model(**changes).train()
        model.set_gradient_checkpointing(is_checkpointed)
        model(**tiny_inputs(), attention_mask=padding()).square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(grad is not None and grad.any() for grad in gradients[0].values())
    assert all(torch.equal(grad, gradients[1][name]) for name, grad in gradients[0].items())


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 3])
def test_denoiser_shares_latents_between_conditional_and_null_text(frames: int):
    model, inputs = tiny_model(), tiny_inputs(frames=frames)
    x, t, text, mask = (value for value in inputs.values() if isinstance(value, Tensor))
    null = torch.randn(text.shape, generator=torch.Generator().manual_seed(2))
    y = torch.cat([text, null])[:, None]
    noise, both = (model.denoiser(y, mask, with_variance=wide, fps=24)(x, t) for wide in (False, True))
    assert noise.shape == (4, 4, frames, 8, 4)
    assert_near(both[:, :4], noise)
    for rows, captions in ((slice(0, 2), text), (slice(2, 4), null)):
        given = inputs | {"encoder_hidden_states": captions}
        assert_near(both[rows], model(**given, enable_temporal_attentions=frames > 1))
    assert not LatteT2V.takes_frame_mask
    with pytest.raises(ValueError, match="x_mask must be None"):
        model.denoiser(y)(x, t, torch.ones(2, frames, dtype=torch.bool))
    with pytest.raises(ValueError, match="texts must be a multiple of the batch of 2 clips, got 3"):
        model.denoiser(y[:3])(x, t)


def test_temporal_attention_is_spatial_attention_with_the_axes_exchanged():
    torch.manual_seed(0)
    time, space = (SelfAttention(TINY, axis, 1) for axis in ("time", "space"))
    space.load_state_dict(time.state_dict())
    x = torch.randn(2, 3, 5, 16)
    assert_near(time(x, Sites(5, 1), None, None), space(x.transpose(1, 2), Sites(3, 1), None, None).transpose(1, 2))


@torch.no_grad()
@pytest.mark.parametrize("is_masked", [False, True])
def test_a_pair_of_blocks_compiles_to_one_graph(is_masked: bool):
    model = tiny_model(compress_kv_factor=2)
    x, modulation = torch.randn(2, 3, 8, 16), torch.randn(2, 6, 16)
    kept = model._kept_patches(padding().flatten(0, 1) if is_masked else None, Sites(4, 2))[1]
    space, time = model.transformer_blocks[1], model.temporal_transformer_blocks[1]

    def pair(x: Tensor, text: Tensor) -> Tensor:
        return time(space(x, modulation, Sites(4, 2), text, None, kept), modulation, Sites(4, 2))

    text = torch.randn(2, 6, 16)
    assert_near(torch.compile(pair, backend="eager", fullgraph=True)(x, text), pair(x, text))


@torch.no_grad()
def test_bf16_weights_and_autocast_stay_near_fp32():
    inputs = tiny_inputs() | {"attention_mask": padding()}
    expected = tiny_model()(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = tiny_model()(**inputs)
    half = tiny_model().to(torch.bfloat16)(**inputs)
    assert mixed.dtype == half.dtype == torch.float32
    # bf16 has 8 bits: 2^-8 per rounding, some 20 roundings in a chain of 4 blocks, in units of the output's scale.
    limit = 20 * 2**-8 * largest(expected)
    assert largest(mixed - expected) < limit
    assert largest(half - expected) < limit


def test_dropout_is_for_training_alone():
    model, inputs = tiny_model(dropout=0.5), tiny_inputs()
    assert torch.equal(model(**inputs), tiny_model()(**inputs))
    torch.manual_seed(0)
    assert largest(model.train()(**inputs) - model(**inputs)) > 1e-3


def test_sampling_first_does_not_break_training_after():
    model, inputs = tiny_model(use_rope=True), tiny_inputs()
    with torch.inference_mode():
        model(**inputs)
    model.train()(**inputs).mean().backward()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_states": torch.zeros(2, 3, 3, 8, 4)}, r"must have shape \(B, 4, T, H, W\), got \(2, 3, 3, 8, 4\)"),
        ({"hidden_states": torch.zeros(2, 4, 3, 8, 5)}, r"multiples of 2 and at least 2, got \(8, 5\)"),
        ({"hidden_states": torch.zeros(2, 4, 1, 8, 4)}, "must have video_length = 3 latent frames.*got 1"),
        ({"hidden_states": torch.zeros(2, 4, 4, 8, 4)}, "must have video_length = 3 latent frames.*got 4"),
        ({"timestep": torch.tensor([1])}, r"timestep must have shape \(2,\), got \(1,\)"),
        ({"use_image_num": 3}, "less than all 3 frames, got 3"),
        ({"use_image_num": 1}, r"must have shape \(2, 2, L, 12\), got \(2, 6, 12\)"),
        ({"encoder_hidden_states": torch.zeros(2, 6, 11)}, r"\(2, L, 12\) or \(2, 1, L, 12\), got \(2, 6, 11\)"),
        ({"encoder_attention_mask": torch.ones(2, 5)}, r"must have shape \(2, 6\) or \(2, 1, 6\), got \(2, 5\)"),
        ({"attention_mask": torch.ones(2, 3, 4, 4)}, r"\(2, 3, 8, 4\) in version 1.1, got \(2, 3, 4, 4\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        tiny_model()(**(tiny_inputs() | changes))


def test_version_1_0_takes_masks_of_patches_only_and_not_with_images():
    model = tiny_model(version="1.0")
    with pytest.raises(ValueError, match=r"must have shape \(6, 8\) in version 1.0"):
        model(**tiny_inputs(), attention_mask=padding())
    with pytest.raises(ValueError, match="must be None with images"):
        model(**tiny_inputs(images=1), attention_mask=torch.ones(8, 8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_type": "layer_norm"}, "norm_type must be 'ada_norm_single', got 'layer_norm'"),
        ({"patch_size_t": 2}, "patch_size_t must be 1, got 2"),
        ({"cross_attention_dim": 12}, "heads x head size = 16, got 12"),
        ({"attention_head_dim": 6, "cross_attention_dim": 12, "use_rope": True}, "multiple of 4, got 2 x 6"),
        ({"use_rope": True, "compress_kv_factor": 2}, "1 with use_rope, got 2"),
        ({"version": "1.0", "use_rope": True}, "version must be '1.1'"),
    ],
)
def test_configurations_of_other_models_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        LatteT2V(replace(TINY, **changes))


@pytest.mark.parametrize("preset", [open_sora_plan_v1_0, open_sora_plan_v1_1], ids=["1.0", "1.1"])
def test_presets_count_in_latents_and_know_no_other_clips(preset: Any):
    for clip in get_args(preset.Clip):
        frames, height, width = map(int, clip.split("x"))
        config = preset.transformer(clip)
        assert (config.video_length, *config.sample_size) == (frames // 4 + 1, height // 8, width // 8)
    with pytest.raises(ValueError, match=r"clip must be one of 65x512x512, .*, got '17x512x512'"):
        preset.transformer("17x512x512")
