"""Token orders: which raster index lies at which place in memory.

Every order but `raster` keeps each cell contiguous, so that any union of cells is a union of whole tiles of memory.
Tokens and their rotary ids are permuted once per picture; the transformer itself never notices.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from scale_dit.errors import UserError
from scale_dit.grid import Grid

ORDERS: dict[str, Callable[[Grid, int], Tensor]] = {}
"""Order name -> function of the grid and the window (tokens a side) that gives every token's sort key, `[H, W]`."""


def register(order: Callable[[Grid, int], Tensor]) -> Callable[[Grid, int], Tensor]:
    """Offer a function `(grid, window) -> sort keys [H, W]` as the order of its own name."""
    ORDERS[order.__name__] = order
    return order


@register
def raster(grid: Grid, window: int) -> Tensor:
    """Row by row through the whole picture."""
    return torch.arange(grid.tokens).view(grid.height, grid.width)


@register
def window(grid: Grid, window: int) -> Tensor:
    """Windows in raster order, cells in raster order inside a window, tokens in raster order inside a cell."""
    cells_a_side = max(1, window // grid.cell)
    row, column = _cell_coordinates(grid)
    window_rank = row // cells_a_side * grid.cells_wide + column // cells_a_side
    cell_rank = (window_rank * cells_a_side + row % cells_a_side) * cells_a_side + column % cells_a_side
    return _by_cell(grid, cell_rank, torch.arange(grid.cell**2).view(grid.cell, grid.cell))


@register
def hilbert(grid: Grid, window: int) -> Tensor:
    """A generalised Hilbert curve over the cells, and one over the tokens inside each cell (Scale-DiT v1)."""
    return _by_cell(grid, _curve_rank(grid.cells_high, grid.cells_wide), _curve_rank(grid.cell, grid.cell))


@lru_cache(maxsize=64)
def permutation(grid: Grid, order: str, window: int | None = None) -> Tensor:
    """Raster index of the token at each place in memory, int64 `[N]`: `in_memory = in_raster[:, permutation]`.

    `window` is in tokens a side; `None` is the whole picture. The result is cached and shared: do not write to it.

    Raises:
        UserError: if the order is unknown.
    """
    if order not in ORDERS:
        raise UserError(f"Unknown order '{order}': use one of {', '.join(sorted(ORDERS))}.")
    whole_picture = max(grid.cells_high, grid.cells_wide) * grid.cell
    return ORDERS[order](grid, window or whole_picture).flatten().argsort()


@lru_cache(maxsize=64)
def inverse(grid: Grid, order: str, window: int | None = None) -> Tensor:
    """Place in memory of each raster index, int64 `[N]`: `in_raster = in_memory[:, inverse]`. Cached, read-only."""
    return permutation(grid, order, window).argsort()


def hilbert_curve(height: int, width: int) -> list[tuple[int, int]]:
    """A space-filling curve over any `height x width` rectangle, as (row, column) in visiting order.

    It runs from (0, 0) to the other end of the longer side. All steps are to one of the four neighbours, except that
    one step is diagonal where the longer side is odd and the shorter even: no path of unit steps exists there (colour
    the rectangle as a chessboard and count). On squares of a power of two it is Hilbert's curve.

    The idea, a recursion that splits a rectangle in two if it is long and in three otherwise, is that of gilbert
    (J. Cerveny, https://github.com/jakubcerveny/gilbert).
    """
    curve: list[tuple[int, int]] = []
    long, short = ((0, width), (height, 0)) if width >= height else ((height, 0), (0, width))
    _fill((0, 0), long, short, curve)
    return curve


def _fill(corner: tuple[int, int], along: tuple[int, int], across: tuple[int, int], curve: list) -> None:
    """Append the rectangle spanned by `along` and `across` at `corner`, entering there and leaving at `along`'s end.

    Both vectors are parallel to an axis; their lengths are the rectangle's sides, in cells.
    """
    length, breadth = abs(sum(along)), abs(sum(across))
    step_along, step_across = _unit(along), _unit(across)
    if length == 1 or breadth == 1:
        step = step_along if breadth == 1 else step_across
        curve += [_add(corner, _times(step, i)) for i in range(max(length, breadth))]
        return

    half_along = _times(step_along, _half(length, even=True if 2 * length > 3 * breadth else None))
    if 2 * length > 3 * breadth:
        _fill(corner, half_along, across, curve)
        _fill(_add(corner, half_along), _subtract(along, half_along), across, curve)
        return

    half_along = _times(step_along, length // 2)
    half_across = _times(step_across, _half(breadth))
    last = _add(_subtract(along, step_along), _subtract(half_across, step_across))
    _fill(corner, half_across, half_along, curve)
    _fill(_add(corner, half_across), along, _subtract(across, half_across), curve)
    _fill(_add(corner, last), _times(half_across, -1), _times(_subtract(along, half_along), -1), curve)
