"""What no layout can be, said before anything is computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scale_dit import order as orders
from scale_dit.errors import UserError

if TYPE_CHECKING:
    from scale_dit.layout import Layout

SCOPES = ("aligned", "global")


def check_sizes(layout: Layout) -> None:
    """Refuse sizes and names that cannot be.

    Raises:
        UserError: naming the value, what is allowed and the remedy.
    """
    if layout.text < 0:
        raise UserError(f"Text length is {layout.text} tokens, but it cannot be negative.")
    cell, window = layout.image.cell, layout.window
    if window is not None:
        _check_multiple("Window", window, cell, lowest=cell)
        picture = layout.whole or layout.image
        longest = max(picture.cells_high, picture.cells_wide) * cell
        if window > longest:
            raise UserError(
                f"Window {window} is larger than the picture's grid of {picture.height} x {picture.width} tokens: use "
                f"at most {longest}, or null for the whole picture."
            )
    _check_multiple("Halo", layout.halo, cell, lowest=0)
    _check_multiple("Shift", layout.shift, cell, lowest=0)
    if layout.shift >= (window or 1):
        allowed = "0, since one window covers the whole picture" if window is None else f"below {window}"
        raise UserError(f"Shift {layout.shift} must be {allowed}.")
    if layout.scope not in SCOPES:
        raise UserError(f"Unknown guidance scope '{layout.scope}': use one of {', '.join(SCOPES)}.")
    orders.check(layout.order)


def check_box(layout: Layout, rows: range, columns: range) -> None:
    """Refuse rows and columns that are no box of the layout's picture.

    Raises:
        UserError: they leave the picture or begin within a cell, or the layout is a box itself.
    """
    if layout.whole is not None:
        raise UserError("A box cannot be cut from a box: cut it from the whole picture's layout.")
    cell, grid = layout.image.cell, layout.image
    for name, part, side in (("Rows", rows, grid.height), ("Columns", columns, grid.width)):
        if not (0 <= part.start < part.stop <= side and part.start % cell == 0):
            raise UserError(
                f"{name} {part.start} to {part.stop} are no box of a picture of {side}: begin at a multiple of {cell}, "
                f"end above it and at most at {side}."
            )


def _check_multiple(name: str, value: int, cell: int, lowest: int) -> None:
    if value < lowest or value % cell:
        near = max(lowest, value // cell * cell)
        raise UserError(
            f"{name} {value} must be a multiple of the cell ({cell} tokens), at least {lowest}: use {near} or "
            f"{near + cell}."
        )
