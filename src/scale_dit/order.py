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
    side = window // grid.cell
    row, column = torch.arange(grid.cells_high)[:, None], torch.arange(grid.cells_wide)[None, :]
    window_rank = row // side * grid.cells_wide + column // side
    cell_rank = (window_rank * side + row % side) * side + column % side
    return _by_cell(grid, cell_rank, torch.arange(grid.cell**2).view(grid.cell, grid.cell))


@register
def hilbert(grid: Grid, window: int) -> Tensor:
    """A generalised Hilbert curve over the cells, and one over the tokens inside each cell (Scale-DiT v1)."""
    return _by_cell(grid, _curve_rank(grid.cells_high, grid.cells_wide), _curve_rank(grid.cell, grid.cell))


def check(order: str) -> None:
    """Refuse an unknown order with a `UserError` that lists the known ones."""
    if order not in ORDERS:
        raise UserError(f"Unknown order '{order}': use one of {', '.join(sorted(ORDERS))}.")


@lru_cache(maxsize=64)
def permutation(grid: Grid, order: str, window: int | None = None) -> Tensor:
    """Raster index of the token at each place in memory, int64 `[N]`: `in_memory = in_raster[:, permutation]`.

    `window` is in tokens a side; `None` is the whole picture. The result is cached and shared: do not write to it.

    Raises:
        UserError: if the order is unknown.
    """
    check(order)
    whole_picture = max(grid.cells_high, grid.cells_wide) * grid.cell
    return ORDERS[order](grid, window or whole_picture).flatten().argsort()


@lru_cache(maxsize=64)
def inverse(grid: Grid, order: str, window: int | None = None) -> Tensor:
    """Place in memory of each raster index, int64 `[N]`: `in_raster = in_memory[:, inverse]`. Cached, read-only."""
    return permutation(grid, order, window).argsort()


def hilbert_curve(height: int, width: int) -> list[tuple[int, int]]:
    """A generalised Hilbert curve: every (row, column) of a `height x width` rectangle once, neighbour after neighbour.

    It starts at (0, 0) and runs along the longer side. All steps are to one of the four neighbours, except that one
    step is diagonal where the longer side is odd and the shorter one is even and above 2: colour the rectangle as a
    chessboard and count to see that its ends cannot be joined otherwise. On squares whose side is a power of two it
    is Hilbert's curve.

    The idea, a recursion that splits a rectangle in two if it is long and in three otherwise, is gilbert's
    (J. Cerveny, https://github.com/jakubcerveny/gilbert).
    """
    curve: list[complex] = []
    along, across = (width, height * 1j) if width >= height else (height * 1j, width)
    _fill(0, along, across, curve)
    return [(int(place.imag), int(place.real)) for place in curve]


def _fill(corner: complex, along: complex, across: complex, curve: list[complex]) -> None:
    """Walk the rectangle that the two vectors span at `corner`: enter there, leave at the far end of `along`.

    A complex number is a vector: columns are its real part, rows its imaginary part.
    """
    length, breadth = int(abs(along)), int(abs(across))
    step_along, step_across = along / length, across / breadth
    if length == 1 or breadth == 1:
        step = step_along if breadth == 1 else step_across
        curve.extend(corner + i * step for i in range(length * breadth))
    elif 2 * length > 3 * breadth:
        first = _even_half(length) * step_along
        _fill(corner, first, across, curve)
        _fill(corner + first, along - first, across, curve)
    else:
        half_along = length // 2 * step_along
        half_across = _even_half(breadth) * step_across
        far_end = corner + (along - step_along) + (half_across - step_across)
        _fill(corner, half_across, half_along, curve)
        _fill(corner + half_across, along, across - half_across, curve)
        _fill(far_end, -half_across, half_along - along, curve)


def _even_half(length: int) -> int:
    """About half, and even if possible: rectangles of even sides are walked without a diagonal step."""
    half = length // 2
    return half + 1 if half % 2 and length > 2 else half


@lru_cache(maxsize=64)
def _curve_rank(height: int, width: int) -> Tensor:
    """When the Hilbert curve visits each place, `[height, width]`."""
    rows, columns = torch.tensor(hilbert_curve(height, width)).unbind(1)
    rank = torch.empty(height, width, dtype=torch.long)
    rank[rows, columns] = torch.arange(height * width)
    return rank


def _by_cell(grid: Grid, cell_rank: Tensor, token_rank: Tensor) -> Tensor:
    """Sort keys `[H, W]` that put cells in the order of `cell_rank` and a cell's tokens in that of `token_rank`."""
    cell = grid.cell
    keys = cell_rank.repeat_interleave(cell, 0).repeat_interleave(cell, 1) * cell**2
    keys += token_rank.repeat(grid.cells_high, grid.cells_wide)
    return keys[: grid.height, : grid.width]
