"""Sizes: pixels -> token grid -> cells."""

from __future__ import annotations

import math
from dataclasses import dataclass

from scale_dit.errors import UserError


@dataclass(frozen=True)
class Grid:
    """A packed latent grid, measured in tokens and cut into `cell x cell` cells from the top left.

    The last row and the last column of cells are ragged where a side is not a multiple of the cell.

    Raises:
        UserError: if a side or the cell is not positive.
    """

    height: int
    width: int
    cell: int

    def __post_init__(self) -> None:
        for name in ("height", "width", "cell"):
            if getattr(self, name) < 1:
                raise UserError(f"Grid {name} is {getattr(self, name)} tokens, but it must be at least 1.")

    @classmethod
    def from_pixels(cls, height_px: int, width_px: int, token_size: int, cell: int) -> Grid:
        """The grid of a picture of `height_px` x `width_px` pixels, where one token covers `token_size` pixels a side.

        Raises:
            UserError: if a side is not a positive multiple of `token_size`; the message names the nearest sizes.
        """
        for name, side in (("Height", height_px), ("Width", width_px)):
            if side < token_size or side % token_size:
                below = max(1, side // token_size) * token_size
                nearest = str(below) if side < token_size else f"{below} or {below + token_size}"
                raise UserError(
                    f"{name} {side} px is not a positive multiple of this base's token size, {token_size} px: "
                    f"use {nearest}."
                )
        return cls(height_px // token_size, width_px // token_size, cell)

    @property
    def tokens(self) -> int:
        """Tokens in all."""
        return self.height * self.width

    @property
    def cells_high(self) -> int:
        """Cells along the height, a ragged one included."""
        return math.ceil(self.height / self.cell)

    @property
    def cells_wide(self) -> int:
        """Cells along the width, a ragged one included."""
        return math.ceil(self.width / self.cell)


def guidance_grid(grid: Grid, scale: float, max_tokens: int | None = None) -> Grid:
    """The draft's grid under a picture's grid: each side divided by `scale` and rounded to whole tokens, at least 1.

    With `max_tokens` the draft is reduced further, in the same proportions, until it has no more tokens than that.

    Raises:
        UserError: if `scale` is below 1 or `max_tokens` is not positive.
    """
    if not scale >= 1:
        raise UserError(f"Scale is {scale}, but the picture cannot be smaller than its draft: use 1 or more.")
    if max_tokens is not None and max_tokens < 1:
        raise UserError(f"The guidance limit is {max_tokens} tokens, but it must be at least 1 (null: no limit).")
    # floor(x + 0.5) and not round(x): halves must not go to the nearest even number.
    height, width = (max(1, math.floor(side / scale + 0.5)) for side in (grid.height, grid.width))
    if max_tokens is not None and height * width > max_tokens:
        reduction = math.sqrt(height * width / max_tokens)
        height = min(max(1, int(height / reduction)), max_tokens)
        width = min(max(1, int(width / reduction)), max_tokens // height)
    return Grid(height, width, grid.cell)
