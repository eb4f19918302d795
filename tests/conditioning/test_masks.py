import random

import pytest
import torch

from opensora.conditioning.masks import (
    MASK_KINDS,
    MaskGenerator,
    MaskGroup,
    align_start,
    apply_mask_strategy,
    continue_mask_strategy,
    latent_to_pixel_frames,
    parse_mask_strategy,
)


def test_missing_fields_take_their_defaults():
    assert parse_mask_strategy("1,2;0,0,-8,0,8,0.5") == [MaskGroup(1, 2), MaskGroup(0, 0, -8, 0, 8, 0.5)]
    assert parse_mask_strategy(None) == parse_mask_strategy("") == []


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ("0;0,x", r"group 1 \('0,x'\): reference must be a int, got 'x'"),
        ("0,0,0,0,1,half", "group 0 .*: edit_ratio must be a float, got 'half'"),
        ("0,0,0,0,1,1.5", r"group 0 .*: edit_ratio must lie in \[0, 1\], got 1.5"),
        ("0,0,0,0,0", "group 0 .*: length must be at least 1, got 0"),
        ("0,0,0,0,1,0,0", "at most 6 fields, got 7"),
        ("0;", r"group 1 \(''\): loop must be a int"),
    ],
)
def test_a_malformed_strategy_is_told_by_group_and_field(strategy: str, message: str):
    with pytest.raises(ValueError, match=message):
        parse_mask_strategy(strategy)


def test_reference_frames_replace_noise_and_other_loops_do_not():
    z = torch.randn(2, 3, 15, 4, 6, generator=torch.Generator().manual_seed(0))
    before = z.clone()
    reference = torch.randn(3, 5, 4, 6, generator=torch.Generator().manual_seed(1))
    strategies = ["0,0,0,-5,9,0.25;1,0", ""]
    filled, mask = apply_mask_strategy(z, [[reference], []], strategies, 0, align=5)
    assert torch.equal(z, before)
    assert torch.equal(filled[0, :, 10:], reference)
    assert torch.equal(filled[0, :, :10], z[0, :, :10])
    assert torch.equal(filled[1], z[1])
    assert mask.dtype == torch.float32
    assert mask.tolist() == [[1.0] * 10 + [0.25] * 5, [1.0] * 15]


def test_references_take_the_dtype_of_the_noise():
    reference = torch.ones(1, 1, 2, 2)
    filled, mask = apply_mask_strategy(torch.zeros(1, 1, 3, 2, 2, dtype=torch.bfloat16), [[reference]], ["0"], 0)
    assert filled.dtype == torch.bfloat16
    assert mask.dtype == torch.float32


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ("0,1", "there are 1 references, no number 1"),
        ("0,0,5", r"reference_start must lie in \[-5, 5\), got 5"),
        ("0,0,0,-16", r"target_start must lie in \[-15, 15\), got -16"),
    ],
)
def test_groups_outside_of_the_clips_are_refused(strategy: str, message: str):
    with pytest.raises(ValueError, match=message):
        apply_mask_strategy(torch.zeros(1, 1, 15, 2, 2), [[torch.zeros(1, 5, 2, 2)]], [strategy], 0)


def test_references_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"must be \(2, 2\) in height and width, got \(2, 3\)"):
        apply_mask_strategy(torch.zeros(1, 1, 15, 2, 2), [[torch.zeros(1, 5, 2, 3)]], ["0"], 0)
    with pytest.raises(ValueError, match="z of 1 samples needs as many"):
        apply_mask_strategy(torch.zeros(1, 1, 15, 2, 2), [], ["0"], 0)


def test_the_end_aligns_to_the_start_of_the_last_whole_chunk():
    assert align_start(14, 5, 15) == 10
    assert [align_start(start, 5, 20) for start in (2, 3, 12, 13)] == [0, 5, 10, 15]


def test_a_loop_continues_from_the_end_of_the_last_clip():
    strategy = continue_mask_strategy("0", loop=1, reference=1, length=5)
    assert parse_mask_strategy(strategy) == [MaskGroup(), MaskGroup(1, 1, -5, 0, 5, 0.0)]
    assert parse_mask_strategy(continue_mask_strategy("", loop=2, reference=0, length=5, edit_ratio=0.5)) == [
        MaskGroup(2, 0, -5, 0, 5, 0.5)
    ]
    assert latent_to_pixel_frames(5) == 17
    with pytest.raises(ValueError, match="multiple of 5 latent frames, got 4"):
        latent_to_pixel_frames(4)


@pytest.mark.parametrize("kind", MASK_KINDS)
@pytest.mark.parametrize("num_frames", [1, 2, 3, 4, 15])
def test_every_kind_leaves_a_frame_to_learn_from(kind: str, num_frames: int):
    generator = MaskGenerator({kind: 1.0}, generator=random.Random(0))
    torch_generator = torch.Generator().manual_seed(0)
    masks = generator(50, num_frames, generator=torch_generator)
    assert masks.shape == (50, num_frames)
    assert masks.dtype == torch.bool
    assert masks.any(dim=1).all()
    is_given = (~masks).any(dim=1)
    if num_frames == 1 or kind == "identity":
        assert not is_given.any()
    elif kind != "random":
        assert is_given.all()


def test_kinds_come_as_often_as_asked():
    generator = MaskGenerator({"image_head": 0.3}, generator=random.Random(0))
    share = (~generator(4000, 5)[:, 0]).float().mean().item()
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / 4000) ** 0.5  # 4 standard errors of a binomial


def test_draws_repeat_with_their_generators():
    def draw() -> torch.Tensor:
        generator = MaskGenerator({"random": 0.5, "quarter_random": 0.5}, generator=random.Random(3))
        return generator(20, 12, generator=torch.Generator().manual_seed(3))

    assert torch.equal(draw(), draw())


def test_unknown_kinds_and_impossible_ratios_are_refused():
    with pytest.raises(ValueError, match=r"kinds must be among identity, .*, got quarter_middle"):
        MaskGenerator({"quarter_middle": 0.1})
    with pytest.raises(ValueError, match="sum to at most 1"):
        MaskGenerator({"random": 0.7, "image_head": 0.7})
