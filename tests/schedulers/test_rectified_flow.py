"""Rectified flow: laws of sampling, masks and losses; recorded trajectories are replayed by tests.oracles."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from opensora.config import RectifiedFlowConfig
from opensora.schedulers.rectified_flow import RectifiedFlow, timestep_transform
from opensora.schedulers.regions import KnownRegion

PLAIN = RectifiedFlowConfig(num_sampling_steps=5, use_timestep_transform=False)
SIZES = {name: torch.tensor([value]) for name, value in (("height", 480.0), ("width", 854.0), ("num_frames", 51.0))}


class StraightFlow:
    """The exact velocity of a flow from `noise` to `clean`: constant along the path, so that Euler makes no error."""

    def __init__(self, clean: Tensor, noise: Tensor) -> None:
        self.clean, self.noise, self.masks = clean, noise, []

    def __call__(self, x: Tensor, t: Tensor, *, x_mask: Tensor | None = None, **ignored: object) -> Tensor:
        self.masks.append(x_mask)
        velocity = (self.clean - self.noise).repeat(len(x) // len(self.clean), 1, 1, 1, 1)
        return torch.cat([velocity, torch.full_like(velocity, torch.nan)], dim=1)


def clip(seed: int, frames: int = 3) -> Tensor:
    return torch.randn(2, 4, frames, 3, 5, generator=torch.Generator().manual_seed(seed))


TEXT = torch.zeros(2, 1, 4, 8)


@pytest.mark.parametrize("options", [{}, {"num_sampling_steps": 1}, {"use_discrete_timesteps": True}])
@pytest.mark.parametrize("null", [None, TEXT])
def test_a_straight_flow_is_followed_exactly_to_its_end(options, null):
    clean, noise = clip(0), clip(1)
    flow = RectifiedFlow(RectifiedFlowConfig(**{"num_sampling_steps": 7, "use_timestep_transform": False} | options))
    out = flow.sample(StraightFlow(clean, noise), noise, TEXT, null)
    torch.testing.assert_close(out, clean, atol=1e-5, rtol=1e-5)


def test_the_transform_keeps_the_ends_of_the_path():
    flow = RectifiedFlow(RectifiedFlowConfig(num_sampling_steps=9))
    clean, noise = clip(0), clip(1)
    out = flow.sample(StraightFlow(clean, noise), noise, TEXT, TEXT, arguments=SIZES)
    torch.testing.assert_close(out, clean, atol=1e-5, rtol=1e-5)
    times = flow.sampling_timesteps(1, SIZES)[:, 0]
    assert float(times[0]) == pytest.approx(1000.0)
    assert (times[1:] < times[:-1]).all()


def test_kept_frames_come_out_untouched_and_generated_ones_are_never_noised():
    clean, noise = clip(0), clip(1)
    frame_mask = torch.tensor([[0.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    z = torch.where(frame_mask[:, None, :, None, None] == 1, noise, clip(2))
    model = StraightFlow(clean, noise)
    out = RectifiedFlow(PLAIN).sample(model, z, TEXT, TEXT, frame_mask=frame_mask)
    kept = frame_mask == 0
    assert torch.equal(out.transpose(1, 2)[kept], z.transpose(1, 2)[kept])
    torch.testing.assert_close(out.transpose(1, 2)[~kept], clean.transpose(1, 2)[~kept], atol=1e-5, rtol=1e-5)
    assert torch.equal(model.masks[0], frame_mask.repeat(2, 1) == 1)


def test_edit_strength_delays_the_start_of_a_frame():
    frame_mask = torch.tensor([[0.5, 1.0, 1.0]]).repeat(2, 1)
    model = StraightFlow(clip(0), clip(1))
    RectifiedFlow(PLAIN).sample(model, clip(1), TEXT, frame_mask=frame_mask)
    # t = 1000, 800, 600, 400, 200: the frame is noised from the first t <= 500 on; then no mask is needed.
    assert [mask is None or bool(mask[0, 0]) for mask in model.masks] == [False, False, False, True, True]


def test_a_mask_of_ones_gives_the_numbers_of_no_mask():
    model, z = StraightFlow(clip(0), clip(1)), clip(2)
    plain = RectifiedFlow(PLAIN).sample(model, z, TEXT, TEXT)
    assert torch.equal(RectifiedFlow(PLAIN).sample(model, z, TEXT, TEXT, frame_mask=torch.ones(2, 3)), plain)
    assert all(mask is None for mask in model.masks)


def test_noise_is_drawn_at_every_step_with_a_mask_and_never_without():
    draws: list[int] = []

    def draw(z: Tensor) -> Tensor:
        draws.append(1)
        return torch.zeros_like(z)

    model = StraightFlow(clip(0), clip(1))
    RectifiedFlow(PLAIN).sample(model, clip(1), TEXT, draw_noise=draw)
    assert not draws
    RectifiedFlow(PLAIN).sample(model, clip(1), TEXT, frame_mask=torch.ones(2, 3), draw_noise=draw)
    assert len(draws) == 5


def test_a_generator_makes_edits_repeatable():
    frame_mask = torch.full((2, 3), 0.7)

    def sample() -> Tensor:
        generator = torch.Generator().manual_seed(5)
        model = StraightFlow(clip(0), clip(1))
        return RectifiedFlow(PLAIN).sample(model, clip(2), TEXT, frame_mask=frame_mask, generator=generator)

    assert torch.equal(sample(), sample())


def test_every_step_is_reported():
    seen: list[tuple[int, int]] = []
    RectifiedFlow(PLAIN).sample(
        StraightFlow(clip(0), clip(1)), clip(1), TEXT, on_step=lambda i, n, z: seen.append((i, n))
    )
    assert seen == [(i, 5) for i in range(5)]


def test_guidance_extrapolates_from_null_to_text():
    def model(x: Tensor, t: Tensor, **ignored: object) -> Tensor:
        return torch.cat([torch.ones(2, 4, 3, 3, 5), torch.zeros(2, 4, 3, 3, 5)])

    z = clip(0)
    out = RectifiedFlow(PLAIN).sample(model, z, TEXT, TEXT, cfg_scale=3.0)
    torch.testing.assert_close(out, z + 3.0, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_frames", [2, 16])
def test_videos_too_short_for_the_transform_are_refused_unless_allowed(num_frames):
    sizes = SIZES | {"num_frames": torch.tensor([float(num_frames)])}
    model = StraightFlow(clip(0), clip(1))
    with pytest.raises(ValueError, match="num_frames must be 1 or at least 17"):
        RectifiedFlow().sample(model, clip(1), TEXT, arguments=sizes)
    with pytest.raises(ValueError, match="num_frames must be 1 or at least 17"):
        RectifiedFlow().training_losses(model, clip(0), sizes)
    allowed = RectifiedFlow(RectifiedFlowConfig(min_latent_frames=5)).sampling_timesteps(1, sizes)
    as_17_frames = RectifiedFlow().sampling_timesteps(1, SIZES | {"num_frames": torch.tensor([17.0])})
    assert torch.equal(allowed, as_17_frames)


def test_missing_sizes_are_named():
    with pytest.raises(ValueError, match=r"\['num_frames'\] missing"):
        RectifiedFlow().sampling_timesteps(1, {name: SIZES[name] for name in ("height", "width")})


def test_a_known_region_follows_the_time_of_each_clip_and_comes_out_exactly():
    known, noise, seen = clip(2), clip(1), []
    model = StraightFlow(clip(0), noise)

    def watched(x: Tensor, t: Tensor, **arguments: object) -> Tensor:
        seen.append((x, t))
        return model(x, t, **arguments)

    sizes = SIZES | {"height": torch.tensor([480.0, 144.0]), "num_frames": torch.tensor([51.0, 102.0])}
    strength = torch.ones(1, 1, 1, 3, 5)
    strength[..., 0] = 0
    strength[..., 1] = 0.6
    flow = RectifiedFlow(RectifiedFlowConfig(num_sampling_steps=7))
    out = flow.sample(watched, noise, TEXT, arguments=sizes, region=KnownRegion(known, strength))
    assert torch.equal(out[..., 0], known[..., 0])
    torch.testing.assert_close(out[..., 2:], clip(0)[..., 2:], atol=1e-5, rtol=1e-5)
    assert not torch.equal(*seen[3][1])
    for x, t in seen:
        expected = flow.add_noise(known, noise, t)
        for b in range(2):
            assert torch.equal(x[b, ..., 0], expected[b, ..., 0])
            assert torch.equal(x[b, ..., 1], expected[b, ..., 1]) == (float(t[b]) > 600)


def test_a_region_has_no_say_in_given_frames():
    known, noise = clip(2), clip(1)
    frame_mask = torch.tensor([[0.0, 1.0, 0.5]]).repeat(2, 1)
    whole = KnownRegion(known, torch.zeros(1, 1, 1, 1, 1))
    z = clip(3)
    plain = RectifiedFlow(PLAIN).sample(
        StraightFlow(clip(0), noise), z, TEXT, frame_mask=frame_mask, draw_noise=lambda z: noise
    )
    out = RectifiedFlow(PLAIN).sample(
        StraightFlow(clip(0), noise), z, TEXT, frame_mask=frame_mask, region=whole, draw_noise=lambda z: noise
    )
    assert torch.equal(out[:, :, 1], known[:, :, 1])
    assert torch.equal(out[:, :, ::2], plain[:, :, ::2])


def test_images_and_the_reference_size_leave_timesteps_alone():
    t = torch.tensor([0.0, 250.0, 1000.0])
    square = torch.tensor([512.0])
    torch.testing.assert_close(timestep_transform(t, square, square, torch.tensor([1.0])), t)


def test_loss_of_the_true_velocity_is_zero_and_counts_only_noised_frames():
    clean, noise = clip(0), clip(1)
    flow, t = RectifiedFlow(PLAIN), torch.tensor([100.0, 900.0])
    assert flow.training_losses(StraightFlow(clean, noise), clean, noise=noise, t=t).tolist() == [0.0, 0.0]

    frame_mask = torch.tensor([[True, False, True], [True, True, True]])
    offset = torch.zeros_like(clean)
    offset[:, :, 1] = 2.0  # an error in the second frame alone
    model = StraightFlow(clean + offset, noise)
    loss = flow.training_losses(model, clean, noise=noise, t=t, frame_mask=frame_mask)
    torch.testing.assert_close(loss, torch.tensor([0.0, 4.0 / 3]), atol=1e-5, rtol=1e-5)
    assert model.masks[0] is frame_mask


def test_weights_multiply_the_loss_at_their_timestep():
    clean, noise = clip(0), clip(1)
    model, t = StraightFlow(clean + 1, noise), torch.tensor([100.0, 900.0])
    weights = torch.arange(1000.0)
    loss = RectifiedFlow(PLAIN).training_losses(model, clean, noise=noise, t=t, weights=weights)
    torch.testing.assert_close(loss, t, atol=1e-2, rtol=1e-5)


def test_training_draws_repeat_with_their_generator():
    model = StraightFlow(clip(0), clip(1))
    losses = [
        RectifiedFlow(PLAIN).training_losses(model, clip(0), generator=torch.Generator().manual_seed(0))
        for _ in range(2)
    ]
    assert torch.equal(*losses)


@pytest.mark.parametrize("num_steps", [-1, 10_001, 10**12])
def test_a_number_of_steps_that_nobody_can_mean_is_refused(num_steps: int):
    flow = RectifiedFlow(RectifiedFlowConfig(num_sampling_steps=num_steps, use_timestep_transform=False))
    with pytest.raises(ValueError, match=f"num_sampling_steps: must be from 1 to 10000, got {num_steps}"):
        flow.sampling_timesteps(1, {})
