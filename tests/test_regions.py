"""Which windows are made anew, and what boxes are computed for them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from scale_dit.errors import UserError
from scale_dit.grid import Grid
from scale_dit.layout import Layout
from scale_dit.regions import regions_around, tokens_of_boxes, tokens_of_mask, whole_windows

LAYOUT = Layout(4, Grid(20, 26, 2), Grid(5, 7, 2), window=4, halo=2)
"""Five by seven windows, the last column half as wide."""


def touched(*places: tuple[int, int]) -> torch.Tensor:
    tokens = torch.zeros(20, 26, dtype=torch.bool)
    for place in places:
        tokens[place] = True
    return tokens


def test_boxes_and_masks_touch_tokens():
    grid = LAYOUT.image
    tokens = tokens_of_boxes([(16, 0, 33, 16), (400, 304, 416, 320)], grid, 16)
    assert tokens.nonzero().tolist() == [[0, 1], [0, 2], [19, 25]]
    mask = torch.zeros(320, 416, dtype=torch.bool)
    mask[0:16, 16:33] = mask[319, 415] = True
    assert torch.equal(tokens_of_mask(mask, grid), tokens)


@pytest.mark.parametrize(
    ("boxes", "words"),
    [
        ([], "the list of boxes is empty"),
        ([(0, 0, 417, 16)], r"\[0, 0, 417, 16\] is not left, top, right, bottom in px inside the picture of 416 x 320"),
        ([(16, 0, 16, 16)], r"\[16, 0, 16, 16\]"),
        ([(0, 0, 16)], r"\[0, 0, 16\]"),
    ],
)
def test_boxes_that_cannot_be_are_named(boxes, words):
    with pytest.raises(UserError, match=words):
        tokens_of_boxes(boxes, LAYOUT.image, 16)


def test_masks_that_cannot_be_are_named():
    with pytest.raises(UserError, match="the mask has 415 x 320 px, which is not the picture's size"):
        tokens_of_mask(torch.ones(320, 415, dtype=torch.bool), LAYOUT.image)
    with pytest.raises(UserError, match="the mask is black all over"):
        tokens_of_mask(torch.zeros(320, 416, dtype=torch.bool), LAYOUT.image)


def test_windows_are_chosen_whole():
    tokens = whole_windows(touched((5, 5), (19, 25)), LAYOUT)
    expected = torch.zeros(20, 26, dtype=torch.bool)
    expected[4:8, 4:8] = expected[16:, 24:] = True
    assert torch.equal(tokens, expected)


def test_regions_part_the_chosen_windows_and_know_their_surroundings():
    places = touched((0, 0), (0, 5), (18, 20))
    regions = regions_around(LAYOUT, whole_windows(places, LAYOUT))
    assert [(region.rows, region.columns) for region in regions] == [
        (range(0, 8), range(0, 12)),
        (range(12, 20), range(16, 26)),
    ]
    whole = torch.zeros(20, 26, dtype=torch.long)
    for region in regions:
        part = region.crop(whole, LAYOUT.image)
        whole = region.paste(whole, part + 1, LAYOUT.image)
    assert torch.equal(whole, whole_windows(places, LAYOUT).long())


def test_regions_of_one_window_cost_one_window_and_its_margin():
    (region,) = regions_around(LAYOUT, whole_windows(touched((9, 9)), LAYOUT), margin=1)
    assert (region.rows, region.columns) == (range(6, 14), range(6, 14))
    (region,) = regions_around(LAYOUT, whole_windows(touched((9, 9)), LAYOUT), margin=0)
    assert region.tokens == 16
    one_window = dataclasses.replace(LAYOUT, window=None)
    (region,) = regions_around(one_window, whole_windows(touched((9, 9)), one_window))
    assert region.tokens == 20 * 26
    assert region.chosen.all()


def test_parts_are_as_fine_as_what_they_are_cut_from():
    (region,) = regions_around(LAYOUT, whole_windows(touched((9, 9)), LAYOUT), margin=2)
    latents = torch.arange(40 * 52.0).view(1, 1, 40, 52)
    part = region.crop(latents, LAYOUT.image)
    assert part.shape[-2:] == (16, 16)
    pasted = region.paste(latents, -part - 1, LAYOUT.image)
    assert torch.equal(pasted < 0, torch.nn.functional.pad(torch.ones(1, 1, 8, 8), (16, 28, 16, 16)).bool())
    assert torch.equal(latents, torch.arange(40 * 52.0).view(1, 1, 40, 52)), "what was given is not written to"
