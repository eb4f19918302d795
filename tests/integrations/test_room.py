"""What the room of integrations may touch, and modules that come from no library."""

from __future__ import annotations

import subprocess
import sys

import torch
from torch import Tensor, nn

from opensora_kernels import apply_opensora_kernels, use


def test_patching_a_model_of_ones_own_does_not_import_diffusers():
    code = (
        "import sys, torch; from opensora_kernels import apply_opensora_kernels; "
        "apply_opensora_kernels(torch.nn.Sequential(torch.nn.Conv3d(2, 2, 3))); print('diffusers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


class CausalConv(nn.Conv3d):
    """Somebody's convolution with the attributes that Wan's has."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3)
        self._padding = (1, 1, 1, 1, 2, 0)

    def forward(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        padding = list(self._padding)
        if cache_x is not None:
            x, padding[4] = torch.cat([cache_x, x], 2), padding[4] - cache_x.shape[2]
        return super().forward(nn.functional.pad(x, padding))


def test_a_module_of_ones_own_is_recognised_by_its_structure():
    model, x = nn.Sequential(CausalConv(2), nn.SiLU(), CausalConv(2)), torch.randn(1, 2, 4, 5, 5)
    before = model(x)
    report = apply_opensora_kernels(model)
    assert [entry.name for entry in report.replaced] == ["0", "2"]
    torch.testing.assert_close(model(x), before)


def test_a_patched_model_obeys_the_choice_of_a_backend():
    model, x = nn.Sequential(CausalConv(2)), torch.randn(1, 2, 4, 5, 5)
    apply_opensora_kernels(model)
    with torch.no_grad(), use(causal_conv3d="library"):
        steps = model(x)
    torch.testing.assert_close(steps, model(x))


def test_random_numbers_and_modes_are_as_they_were():
    model = nn.Sequential(CausalConv(2)).train()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    apply_opensora_kernels(model)
    assert torch.rand(1) == expected
    assert model[0].training


def test_weights_without_values_are_left_alone():
    with torch.device("meta"):
        model = nn.Sequential(CausalConv(2))
    assert "meta device" in apply_opensora_kernels(model).left[-1].reason
