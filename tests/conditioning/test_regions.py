"""Regions of a picture: how they are written, and what of the latents they stand for."""

from __future__ import annotations

import pytest
import torch

from opensora.conditioning.regions import Box, box_mask, latent_mask, parse_box, soft_edges


def test_a_box_is_four_numbers_and_anything_else_is_a_file():
    assert parse_box("1,2,3,4") == Box(top=1, left=2, height=3, width=4)
    assert parse_box("mask.png") is None
    assert parse_box("a,b.png") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,2,x,4", "height must be a whole number of pixels, got 'x'"),
        ("0,0,0,4", "at least one pixel"),
        ("-1,0,2,2", "begin at 0"),
    ],
)
def test_a_bad_box_is_refused(text: str, message: str):
    with pytest.raises(ValueError, match=message):
        parse_box(text)


def test_a_box_outside_of_the_picture_is_refused():
    with pytest.raises(ValueError, match=r"must lie inside of 8 x 8 pixels, got \(4, 0, 5, 8\)"):
        box_mask(Box(4, 0, 5, 8), 8, 8)


def test_a_latent_is_in_the_region_if_one_pixel_of_one_frame_behind_it_is():
    mask = torch.zeros(5, 16, 16, dtype=torch.bool)
    mask[3, 8, 15] = True
    found = latent_mask(mask, [0, 1, 5], (2, 2))
    assert found.shape == (2, 2, 2)
    assert found.nonzero().tolist() == [[1, 1, 1]]
    assert latent_mask(mask[3:4], [0, 1, 5], (2, 2)).sum() == 2  # one picture for all frames


def test_soft_edges_end_where_the_region_does_and_leave_its_inside():
    mask = box_mask(Box(4, 4, 24, 24), 32, 32)
    share = soft_edges(mask, 4)
    assert not share[~mask].any()
    assert share[0, 10:20, 10:20].eq(1).all()
    row = share[0, 16, 4:9]
    assert (row.diff() >= 0).all()
    assert 0 < row[0] < 1
    assert torch.equal(soft_edges(mask, 0), mask.float())
    assert torch.equal(
        soft_edges(box_mask(Box(9, 0, 3, 32), 32, 32), 8).amax(dim=(1, 2)), torch.ones(1)
    )  # a thin strip
    touching = box_mask(Box(0, 0, 32, 16), 32, 32)  # the picture's own border is no edge
    assert soft_edges(touching, 4)[0, 0, 0] == 1
