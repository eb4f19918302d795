"""What is special about guided_euler_step: guidance, channels beyond z's, frames that stay, dtypes."""

from __future__ import annotations

import torch
from torch import Tensor

from opensora_kernels import guided_euler_step


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_equals_the_update_written_out_per_sample():
    z, velocity, dt = draw(2, 4, 3, 2, 2, seed=1), draw(4, 8, 3, 2, 2, seed=2), torch.tensor([0.1, 0.25])
    frame_mask = torch.tensor([[True, False, True], [False, True, True]])
    have = guided_euler_step(z, velocity, dt, guidance_scale=7.0, frame_mask=frame_mask)
    for b in range(2):
        for t in range(3):
            conditional, null = velocity[b, :4, t], velocity[2 + b, :4, t]
            moved = z[b, :, t] + (null + 7.0 * (conditional - null)) * dt[b]
            assert torch.equal(have[b, :, t], moved if frame_mask[b, t] else z[b, :, t])


def test_scale_one_follows_the_conditional_rows_and_zero_the_null_rows():
    # Quarters in [-2, 2): every sum below is exact, so that v_null + (v_conditional - v_null) is v_conditional.
    generator = torch.Generator().manual_seed(1)
    z = torch.randint(-8, 8, (2, 4, 3, 2, 2), generator=generator).float() / 4
    velocity = torch.randint(-8, 8, (4, 4, 3, 2, 2), generator=generator).float() / 4
    dt = torch.tensor([0.5, 0.25])
    for scale, rows in ((1.0, velocity[:2]), (0.0, velocity[2:])):
        want = guided_euler_step(z, rows, dt, guidance_scale=None)
        assert torch.equal(guided_euler_step(z, velocity, dt, guidance_scale=scale), want)


def test_steps_of_a_straight_flow_end_at_its_data_point():
    noise, data = draw(1, 4, 3, 2, 2, seed=1).double(), draw(1, 4, 3, 2, 2, seed=2).double()
    z = noise
    for dt in (0.5, 0.3, 0.2):
        z = guided_euler_step(z, data - noise, torch.tensor([dt], dtype=torch.float64), guidance_scale=None)
    torch.testing.assert_close(z, data)


def test_bf16_latents_take_the_dtype_of_an_fp32_velocity():
    z, velocity, dt = draw(1, 4, 3, 2, 2, seed=1).bfloat16(), draw(2, 4, 3, 2, 2, seed=2), torch.tensor([0.1])
    frame_mask = torch.tensor([[True, False, True]])
    have = guided_euler_step(z, velocity, dt, guidance_scale=7.0, frame_mask=frame_mask)
    assert have.dtype == torch.float32
    assert torch.equal(have, guided_euler_step(z.float(), velocity, dt, guidance_scale=7.0, frame_mask=frame_mask))
    assert guided_euler_step(z, velocity.bfloat16(), dt, guidance_scale=7.0).dtype == torch.bfloat16
