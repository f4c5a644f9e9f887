from __future__ import annotations

import pytest

from scale_dit.errors import UserError
from scale_dit.grid import Grid, guidance_grid


def test_a_picture_of_whole_tokens_has_its_grid():
    grid = Grid.from_pixels(4096, 1040, token_size=16, cell=8)
    assert (grid.height, grid.width) == (256, 65)
    assert grid.tokens == 256 * 65
    assert (grid.cells_high, grid.cells_wide) == (32, 9), "the last column of cells is ragged"


@pytest.mark.parametrize(
    ("size", "named", "remedy"),
    [
        ((1000, 1024), "Height 1000", "992 or 1008"),
        ((1024, 1030), "Width 1030", "1024 or 1040"),
        ((0, 16), "Height 0", "use 16"),
        ((16, -32), "Width -32", "use 16"),
    ],
)
def test_other_sizes_name_the_value_and_the_nearest_allowed(size, named, remedy):
    with pytest.raises(UserError, match=named) as error:
        Grid.from_pixels(*size, token_size=16, cell=8)
    assert remedy in str(error.value)


@pytest.mark.parametrize("sides", [(0, 4, 2), (4, 0, 2), (4, 4, 0)])
def test_empty_grids_are_refused(sides):
    with pytest.raises(UserError, match="at least 1"):
        Grid(*sides)


@pytest.mark.parametrize(
    ("grid", "scale", "sides"),
    [
        (Grid(256, 256, 8), 4, (64, 64)),
        (Grid(256, 65, 8), 4, (64, 16)),
        (Grid(10, 6, 2), 4, (3, 2)),  # 2.5 -> 3 and 1.5 -> 2: halves go up
        (Grid(3, 200, 2), 8, (1, 25)),
        (Grid(64, 48, 2), 1.6, (40, 30)),
        (Grid(7, 5, 2), 1, (7, 5)),
    ],
)
def test_the_draft_is_the_picture_over_the_scale(grid, scale, sides):
    draft = guidance_grid(grid, scale)
    assert (draft.height, draft.width) == sides
    assert draft.cell == grid.cell


@pytest.mark.parametrize(
    ("grid", "limit", "sides"),
    [
        (Grid(256, 256, 8), 256, (16, 16)),
        (Grid(256, 256, 8), 5000, (64, 64)),
        (Grid(128, 256, 8), 200, (10, 20)),
        (Grid(4, 400, 2), 16, (1, 16)),
        (Grid(400, 4, 2), 16, (16, 1)),
    ],
)
def test_a_limited_draft_keeps_its_proportions_and_the_limit(grid, limit, sides):
    draft = guidance_grid(grid, 4, max_tokens=limit)
    assert (draft.height, draft.width) == sides
    assert draft.tokens <= limit


def test_scales_below_one_and_empty_limits_are_refused():
    with pytest.raises(UserError, match=r"0\.5"):
        guidance_grid(Grid(8, 8, 2), 0.5)
    with pytest.raises(UserError, match="nan"):
        guidance_grid(Grid(8, 8, 2), float("nan"))
    with pytest.raises(UserError, match="limit"):
        guidance_grid(Grid(8, 8, 2), 4, max_tokens=0)
