"""Recomputation changes what is kept, never what is computed."""

from __future__ import annotations

import pytest
import torch

from opensora.config import RunConfig, STDiT3Config
from opensora.estimate.paper import step_memory
from opensora.models import STDiT3

CONFIG = STDiT3Config(hidden_size=48, depth=2, num_heads=4, caption_channels=16, model_max_length=8)
MODES = ("none", "selective", "full")


def model() -> STDiT3:
    torch.manual_seed(0)
    made = STDiT3(CONFIG).train()
    for parameter in made.parameters():  # zero-initialised layers would hide whole blocks
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return made


def test_gradients_are_the_same_and_less_is_kept():
    made = model()
    x, y, numbers = torch.randn(2, 4, 3, 8, 8), torch.randn(2, 1, 8, 16), torch.tensor([3.0, 500.0])

    def forward() -> torch.Tensor:
        return made(x, numbers, y, fps=numbers, height=64.0, width=64.0, generator=torch.Generator().manual_seed(1))

    gradients, kept = [], []
    for mode in MODES:
        made.set_gradient_checkpointing(mode)
        made.zero_grad()
        forward().square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in made.parameters() if p.grad is not None]))
        kept.append(step_memory(made, forward).kept)
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])
    assert kept[0] > 1.3 * kept[1] > 1.3 * 2 * kept[2]


def test_words_and_booleans_mean_the_same():
    assert [RunConfig(grad_checkpoint=mode).checkpointing for mode in (False, True, *MODES)] == ["none", "full", *MODES]
    made = model()
    made.set_gradient_checkpointing()
    assert made.gradient_checkpointing
    made.set_gradient_checkpointing(False)
    assert not made.gradient_checkpointing
    with pytest.raises(ValueError, match="must be none, selective or full, got 'some'"):
        made.set_gradient_checkpointing("some")
