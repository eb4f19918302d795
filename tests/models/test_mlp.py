"""GELU in the MLP's first matrix product: where it is used, and that it is the same function."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from opensora.models import layers
from opensora.models.layers import Mlp, fuses_gelu
from tests.ops.accuracy import assert_accurate


def test_gelu_is_a_pass_of_its_own_on_other_devices():
    with torch.no_grad():
        assert not fuses_gelu(torch.empty(2, 3))
        assert not fuses_gelu(torch.empty(2, 3, device="meta"))


def test_the_fused_product_has_the_bias_and_shape_of_the_plain_one(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    mlp, x = Mlp(6, 24), torch.randn(2, 3, 5, 6)
    monkeypatch.setattr(layers, "fuses_gelu", lambda x: True)
    with torch.no_grad():
        # on the CPU the operator takes the erf form of GELU
        torch.testing.assert_close(mlp(x), mlp.fc2(F.gelu(mlp.fc1(x))))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gelu_in_the_product_is_as_accurate_as_a_pass_of_its_own(dtype: torch.dtype):
    torch.manual_seed(0)
    mlp, x = Mlp(1152, 4608).to("cuda", dtype), torch.randn(2, 300, 1152, device="cuda", dtype=dtype)
    plain = mlp(x)
    with torch.no_grad():
        assert fuses_gelu(x)
        fused = mlp(x)
        truth = mlp.double()(x.double())
    assert_accurate(fused, plain.detach(), truth, f"Mlp in {dtype}")


@pytest.mark.gpu
def test_gelu_is_a_pass_of_its_own_for_gradients_and_autocast():
    mlp, x = Mlp(16, 64).cuda(), torch.randn(2, 3, 16, device="cuda")
    mlp(x).sum().backward()
    assert mlp.fc1.weight.grad is not None
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        assert not fuses_gelu(x)
        assert mlp(x).dtype == torch.bfloat16
