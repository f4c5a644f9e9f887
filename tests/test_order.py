from __future__ import annotations

import time
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scale_dit import order as orders
from scale_dit.errors import UserError
from scale_dit.grid import Grid
from scale_dit.order import hilbert_curve, inverse, permutation

grids = st.builds(Grid, st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 2, 3, 4, 8]))


@settings(deadline=None, max_examples=60)
@given(grids, st.sampled_from(sorted(orders.ORDERS)), st.sampled_from([None, 1, 2, 3]))
def test_an_order_visits_every_token_once_and_a_cell_in_one_run(grid, order, cells_a_window):
    window = cells_a_window and cells_a_window * grid.cell
    places = permutation(grid, order, window)
    assert places.dtype == torch.int64
    assert torch.equal(places.sort().values, torch.arange(grid.tokens))
    assert torch.equal(places[inverse(grid, order, window)], torch.arange(grid.tokens))
    if order != "raster":
        row, column = places // grid.width, places % grid.width
        cells = row // grid.cell * grid.cells_wide + column // grid.cell
        assert len(cells.unique_consecutive()) == grid.cells_high * grid.cells_wide


@settings(deadline=None, max_examples=30)
@given(grids, st.integers(1, 4))
def test_window_order_keeps_a_window_in_one_run(grid, cells_a_window):
    window = cells_a_window * grid.cell
    places = permutation(grid, "window", window)
    windows = places // grid.width // window * grid.width + places % grid.width // window
    visited = windows.unique_consecutive()
    assert torch.equal(visited, visited.sort().values), "windows come in raster order"
    assert len(visited) == -(-grid.height // window) * -(-grid.width // window)


def test_small_orders_are_as_drawn():
    assert permutation(Grid(2, 3, 2), "raster").tolist() == [0, 1, 2, 3, 4, 5]
    # Two windows of 2 x 2 cells of one token, then the ragged third.
    assert permutation(Grid(2, 5, 1), "window", 2).tolist() == [0, 1, 5, 6, 2, 3, 7, 8, 4, 9]
    # Cells of 2 x 2 inside one window.
    assert permutation(Grid(4, 4, 2), "window", 4).tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    assert permutation(Grid(4, 4, 2), "window") is permutation(Grid(4, 4, 2), "window"), "cached"


def test_the_curve_on_powers_of_two_is_hilberts():
    assert hilbert_curve(2, 2) == [(0, 0), (1, 0), (1, 1), (0, 1)]
    turn = [(0, 0), (0, 1), (1, 1), (1, 0)]
    up = [(0, 0), (1, 0), (1, 1), (0, 1)]
    back = [(1, 1), (1, 0), (0, 0), (0, 1)]
    quadrants = [(0, 0, turn), (2, 0, up), (2, 2, up), (0, 2, back)]
    assert hilbert_curve(4, 4) == [(top + y, left + x) for top, left, part in quadrants for y, x in part]
    # The property that makes it Hilbert's: every aligned square of a power of two is visited in one run.
    for size in (2, 4, 8):
        squares = [(y // size, x // size) for y, x in hilbert_curve(16, 16)]
        assert sum(a != b for a, b in pairwise(squares)) == (16 // size) ** 2 - 1


def test_the_curve_takes_unit_steps_on_every_rectangle_up_to_32():
    for height in range(1, 33):
        for width in range(1, 33):
            curve = hilbert_curve(height, width)
            assert len(set(curve)) == len(curve) == height * width
            assert curve[0] == (0, 0)
            steps = [(abs(b[0] - a[0]), abs(b[1] - a[1])) for a, b in pairwise(curve)]
            longer, shorter = max(height, width), min(height, width)
            diagonal = longer % 2 == 1 and shorter % 2 == 0 and shorter > 2
            assert steps.count((1, 1)) == diagonal, (height, width)
            assert all(sum(step) == 1 or step == (1, 1) for step in steps), (height, width)


def test_8k_is_ordered_in_seconds():
    start = time.perf_counter()
    permutation(Grid(512, 512, 8), "hilbert")
    assert time.perf_counter() - start < 5


def test_unknown_orders_name_the_known():
    with pytest.raises(UserError, match=r"'peano'.*hilbert, raster, window"):
        permutation(Grid(4, 4, 2), "peano")


def test_a_new_order_is_one_function(monkeypatch):
    monkeypatch.setattr(orders, "ORDERS", dict(orders.ORDERS))

    @orders.register
    def columns(grid, window):
        return torch.arange(grid.tokens).view(grid.width, grid.height).T

    assert permutation(Grid(2, 3, 1), "columns").tolist() == [0, 3, 1, 4, 2, 5]
