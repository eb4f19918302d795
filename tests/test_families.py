"""Families: released keys are recognised, and what shapes tell of a configuration is what was released."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from opensora.config import STDiT3Config
from opensora.config_files import config_from_dict
from opensora.families import config_from_shapes, find, named_in, recognise
from opensora.family_models import OURS
from opensora.models import STDiT, STDiT2, STDiT3
from opensora.presets import open_sora_v1_0, open_sora_v1_1
from tests.released_layouts import STDIT, STDIT2, STDIT3, autoencoder_kl, latte_state, pixart_state

KEYS = Path(__file__).parent / "models" / "keys"
RELEASED = {
    "stdit-xl-2": "STDiT",
    "stdit2-xl-2": "STDiT2",
    "stdit3-xl-2": "STDiT3",
    "opensora-vae-v1.2": "VideoVAE",
    "causalvideovae-v1.0": "CausalVideoVAE",
    "causalvideovae-v1.1": "CausalVideoVAE",
}


def released_shapes(name: str) -> dict[str, tuple[int, ...]]:
    keys = json.loads((KEYS / f"{name}.json").read_text())
    keys.pop("_meta", None)
    return {key: tuple(entry["shape"] if isinstance(entry, dict) else entry) for key, entry in keys.items()}


def shapes_of(state: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


@pytest.mark.parametrize(("name", "family"), RELEASED.items())
def test_released_keys_are_recognised(name: str, family: str):
    assert recognise(released_shapes(name)) == find(family)


def test_image_models_and_others_are_recognised():
    assert recognise(shapes_of(pixart_state())).name == "PixArt"
    assert recognise(shapes_of(latte_state())).name == "LatteT2V"
    shapes = shapes_of(autoencoder_kl().state_dict())
    assert recognise(shapes).name == "AutoencoderKL"
    of_video = {name: (*shape, 3) if len(shape) == 4 else shape for name, shape in shapes.items()}
    assert recognise(of_video) is None
    assert recognise({"layer.weight": (2, 2)}) is None


def test_keys_count_more_than_what_a_configuration_says():
    config = {"_class_name": "LatteT2V"}
    assert recognise({}, config) == named_in(config) == find("lattet2v")
    assert recognise(shapes_of(pixart_state()), config).name == "PixArt"
    assert named_in({"architectures": ["VideoAutoencoderPipeline"]}).name == "VideoVAE"
    with pytest.raises(ValueError, match=r"family: must be one of STDiT3, STDiT2, .* got 'unet'"):
        find("unet")


def test_shapes_tell_the_released_configurations():
    for name, config in (
        ("stdit-xl-2", open_sora_v1_0.transformer("16x256x256")),
        ("stdit2-xl-2", open_sora_v1_1.transformer()),
        ("stdit3-xl-2", STDiT3Config()),
    ):
        found = config_from_shapes(RELEASED[name], released_shapes(name))
        assert config_from_dict(type(config), found) == config
    for model, config in ((STDiT, STDIT), (STDiT2, STDIT2), (STDiT3, STDIT3)):
        found = config_from_shapes(model.__name__, shapes_of(model(config).state_dict()))
        assert config_from_dict(type(config), found) == config
    assert config_from_shapes("VideoVAE", released_shapes("opensora-vae-v1.2")) is None


def test_what_shapes_do_not_tell_is_left_out():
    shapes = shapes_of(STDiT(STDIT).state_dict())
    untold = {name: shape for name, shape in shapes.items() if not name.startswith("pos_embed")}
    assert "space_scale" not in config_from_shapes("STDiT", untold)
    odd = config_from_shapes("PixArt", shapes_of(pixart_state()) | {"x_embedder.proj.weight": (100, 3, 2, 2)})
    assert "num_heads" not in odd
    assert (
        config_from_shapes("STDiT2", shapes_of(STDiT2(replace(STDIT2, qk_norm=False)).state_dict()))["qk_norm"] is False
    )


def test_every_model_of_ours_is_a_family():
    for name, (model_type, _) in OURS.items():
        assert find(name).name == model_type.__name__
