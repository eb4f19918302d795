"""Starting one transformer from another: what is carried, what starts new, and that images stay what they were."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from opensora.adaptation import MODELS, adapt, adapted_config
from opensora.models import STDiT, STDiT2, STDiT3
from tests.released_layouts import STDIT, STDIT2, STDIT3, named_state, pixart_state

CONFIGS = {"STDiT": STDIT, "STDiT2": replace(STDIT2, qk_norm=False), "STDiT3": replace(STDIT3, qk_norm=False)}
CLIP = {name: torch.full((2,), value) for name, value in (("height", 32.0), ("width", 48.0), ("ar", 2 / 3))}
LENGTHS = (2, 4)


def new_model(target: str, **changes: object) -> STDiT | STDiT2 | STDiT3:
    torch.manual_seed(0)
    return MODELS[target](replace(CONFIGS[target], **changes)).eval()


def inputs(num_frames: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(2, 3, num_frames, 4, 6, generator=generator),
        "timestep": torch.tensor([924.0, 100.0]),
        "y": torch.randn(2, 1, 4, 8, generator=generator),
        "mask": (torch.arange(4) < torch.tensor(LENGTHS)[:, None]).long(),
    }


def image_model(state: dict[str, Tensor], x_BCHW: Tensor, timestep: Tensor, y_B1LC: Tensor, table: Tensor) -> Tensor:
    """PixArt with the 2-D table of positions (1, S, D): (B, 2C, H, W)."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (STDIT.num_heads, -1)).transpose(1, 2)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(heads(q), heads(k), heads(v)).transpose(1, 2).flatten(2)

    angles = timestep[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    t_BD = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1))))
    t6 = linear("t_block.1", F.silu(t_BD)).unflatten(1, (6, -1)) + state["blocks.0.scale_shift_table"]
    shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = t6[:, :, None].unbind(1)
    y = linear("y_embedder.y_proj.fc2", F.gelu(linear("y_embedder.y_proj.fc1", y_B1LC[:, 0]), approximate="tanh"))

    x = F.conv2d(x_BCHW, state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], stride=2)
    x = x.flatten(2).mT + table
    h = attend(*linear("blocks.0.attn.qkv", modulated(x, shift_attn, scale_attn)).chunk(3, dim=-1))
    x = x + gate_attn * linear("blocks.0.attn.proj", h)
    q, kv = linear("blocks.0.cross_attn.q_linear", x), linear("blocks.0.cross_attn.kv_linear", y)
    read = [attend(q[i : i + 1], *kv[i : i + 1, :length].chunk(2, dim=-1)) for i, length in enumerate(LENGTHS)]
    x = x + linear("blocks.0.cross_attn.proj", torch.cat(read))
    h = F.gelu(linear("blocks.0.mlp.fc1", modulated(x, shift_mlp, scale_mlp)), approximate="tanh")
    x = x + gate_mlp * linear("blocks.0.mlp.fc2", h)
    shift, scale = (state["final_layer.scale_shift_table"] + t_BD[:, None]).chunk(2, dim=1)
    patches = linear("final_layer.linear", modulated(x, shift, scale)).unflatten(-1, (2, 2, 6)).unflatten(1, (2, 3))
    return patches.permute(0, 5, 1, 3, 2, 4).reshape(2, 6, 4, 6)


def table_of(model: STDiT | STDiT2 | STDiT3) -> Tensor:
    if isinstance(model, STDiT):
        return model.position_tables((1, 2, 3))[0]
    return model.position_table((1, 2, 3), 32.0, 48.0)


@pytest.mark.parametrize("target", CONFIGS)
@pytest.mark.parametrize("num_frames", [1, 3])
def test_every_frame_of_the_new_video_model_is_what_the_image_model_makes(target: str, num_frames: int):
    model, state, given = new_model(target), pixart_state(), inputs(num_frames)
    adapt(state, model)
    clip = CLIP | {"num_frames": torch.full((2,), float(num_frames)), "fps": torch.full((2,), 24.0)}
    out = model(**given, **clip)
    for frame in range(num_frames):
        image = image_model(state, given["x"][:, :, frame], given["timestep"], given["y"], table_of(model))
        # A chain of 12 matrix products in fp32, values up to 5.
        torch.testing.assert_close(out[:, :, frame], image, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("target", CONFIGS)
def test_all_of_an_image_model_is_carried_and_only_time_and_sizes_start_new(target: str):
    model = new_model(target)
    adaptation = adapt(pixart_state(), model)
    assert (adaptation.source, adaptation.target, adaptation.left) == ("PixArt", target, ())
    assert len(adaptation.carried) == len(pixart_state()) - 1  # the table of positions
    about_time = ("attn_temp", "temporal", "t_block_temp", "rope.", "fl_embedder", "fps_embedder", "csize_", "ar_")
    assert all(any(part in name for part in about_time) for name in adaptation.new)
    assert {*adaptation.new, *adaptation.carried} == {name for name in model.state_dict() if "pos_embed" not in name}


def test_qk_norm_starts_new_and_is_said_to():
    adaptation = adapt(pixart_state(), new_model("STDiT3", qk_norm=True))
    assert "spatial_blocks.0.attn.q_norm.weight" in adaptation.new
    assert "spatial_blocks.*.attn.q_norm.weight" in str(adaptation)


def test_size_embedders_of_an_image_model_with_sizes_are_carried():
    donor = named_state(STDiT2(CONFIGS["STDiT2"]))
    sizes = {name: tensor for name, tensor in donor.items() if name.startswith(("csize_embedder", "ar_embedder"))}
    model = new_model("STDiT2")
    adapt(pixart_state() | sizes, model)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in sizes.items())
    adaptation = adapt(pixart_state() | sizes, new_model("STDiT3"))
    assert set(adaptation.left) == set(sizes)


def test_stdit_to_stdit2_keeps_all_weights_and_adds_conditions_without_effect_on_space():
    state, model, given = named_state(STDiT(STDIT)), new_model("STDiT2"), inputs(1)
    adaptation = adapt(state, model)
    assert adaptation.left == ()
    own = model.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in state.items() if name != "x_embedder.proj.weight")
    clip = CLIP | {"num_frames": torch.ones(2), "fps": torch.full((2,), 120.0)}
    space = model.embed_conditions(given["timestep"], clip, with_zero=False).space_GB6D
    t_BD = model.t_embedder(given["timestep"])
    torch.testing.assert_close(space[0], model.t_block(t_BD).unflatten(-1, (6, -1)))


def test_stdit2_to_stdit3_splits_every_block_in_two():
    state, model = named_state(STDiT2(STDIT2)), new_model("STDiT3", qk_norm=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adaptation = adapt(state, model)
    own = model.state_dict()
    for source, target in (
        ("blocks.0.attn.qkv.weight", "spatial_blocks.0.attn.qkv.weight"),
        ("blocks.0.cross_attn.proj.weight", "spatial_blocks.0.cross_attn.proj.weight"),
        ("blocks.0.scale_shift_table", "spatial_blocks.0.scale_shift_table"),
        ("blocks.0.attn_temp.k_norm.weight", "temporal_blocks.0.attn.k_norm.weight"),
        ("blocks.0.attn_temp.proj.weight", "temporal_blocks.0.attn.proj.weight"),
    ):
        assert torch.equal(own[target], state[source]), target
    table = own["temporal_blocks.0.scale_shift_table"]
    assert torch.equal(table[:3], state["blocks.0.scale_shift_table_temporal"])
    assert torch.equal(table[3:], before["temporal_blocks.0.scale_shift_table"][3:])
    assert not own["fps_embedder.mlp.2.weight"].any()
    assert not own["temporal_blocks.0.cross_attn.proj.weight"].any()
    assert {name.split(".")[0] for name in adaptation.left} == {
        *("t_block_temp", "csize_embedder", "ar_embedder", "fl_embedder", "fps_embedder")
    }
    assert all(name.startswith(("temporal_blocks.0.", "fps_embedder.")) for name in adaptation.new)


def test_null_captions_are_extended_to_the_new_length():
    model = new_model("STDiT3", model_max_length=6)
    adapt(pixart_state(), model)
    table = pixart_state()["y_embedder.y_embedding"]
    assert torch.equal(model.y_embedder.y_embedding, torch.cat([table, table[-1:], table[-1:]]))


def test_the_configuration_of_the_new_model_is_the_released_one_in_the_size_of_the_old():
    shapes = {name: tuple(tensor.shape) for name, tensor in pixart_state().items()}
    config = adapted_config(shapes, "STDiT2", qk_norm=False)
    assert config == replace(STDIT2, qk_norm=False, model_max_length=200)
    assert adapted_config(shapes, "STDiT").input_size == (16, 32, 32)
    odd = shapes | {"x_embedder.proj.weight": (100, 3, 2, 2)}
    with pytest.raises(ValueError, match="num_heads must be given: heads of 72 channels do not divide 100"):
        adapted_config(odd, "STDiT3")
    assert adapted_config(odd, "STDiT3", num_heads=4).num_heads == 4


def test_what_cannot_be_a_start_is_refused_and_changes_nothing():
    model = new_model("STDiT3", depth=2)
    before = model.state_dict()["x_embedder.proj.weight"].clone()
    with pytest.raises(ValueError, match="depth of the PixArt must be 2, as of the model, got 1"):
        adapt(pixart_state(), model)
    with pytest.raises(ValueError, match=r"STDiT3 can start from PixArt or STDiT or STDiT2, got STDiT3 of Open-Sora"):
        adapt(named_state(STDiT3(STDIT3)), model)
    with pytest.raises(ValueError, match="got keys of no family known here"):
        adapt({"layer.weight": torch.zeros(2)}, model)
    with pytest.raises(ValueError, match=r"must have the shapes of STDiT3, got blocks\.0.mlp.fc1.weight"):
        adapt(pixart_state(), new_model("STDiT3", mlp_ratio=4.0))
    with pytest.raises(ValueError, match="target must be one of STDiT, STDiT2, STDiT3, got 'VideoVAE'"):
        adapted_config({}, "VideoVAE")
    assert torch.equal(model.state_dict()["x_embedder.proj.weight"], before)
