"""Pictures that join themselves at their edges: how far each step sees them moved."""

from __future__ import annotations

from dataclasses import dataclass

from scale_dit.errors import UserError
from scale_dit.grid import Grid

WRAPS = ("none", "horizontal", "both")
STRIDES = (0.7548776662466927, 0.6180339887498949)
"""Shares of the rows and columns that one step after the other moves on by: multiples of these leave no large gap."""


@dataclass(frozen=True)
class Shift:
    """How far a picture and its draft are moved, in tokens along rows and columns."""

    image: tuple[int, int]
    draft: tuple[int, int]


STILL = Shift((0, 0), (0, 0))


def check_wrap(wrap: str) -> None:
    """Refuse an unknown name.

    Raises:
        UserError: `wrap` is unknown.
    """
    if wrap not in WRAPS:
        raise UserError(f"unknown wrap {wrap!r}: use one of {', '.join(WRAPS)}")


def wrap_shift(image: Grid, draft: Grid | None, wrap: str, step: int) -> Shift:
    """How far a step sees a picture moved that is to join itself: at each step its edges lie somewhere else.

    By whole cells of the picture, and by whole tokens of the draft: by nearly the same share of their sides.

    Args:
        wrap: `none`, `horizontal` (left and right edge join) or `both`.
        step: From 0 on.

    Raises:
        UserError: `wrap` is unknown.
    """
    check_wrap(wrap)
    below = draft or Grid(1, 1, 1)
    sides = zip((image.height, image.width), (below.height, below.width), STRIDES, strict=True)
    rows, columns = (_nearest(side, under, image.cell, step * stride % 1.0) for side, under, stride in sides)
    still = (0, 0)
    rows, columns = {"none": (still, still), "horizontal": (still, columns), "both": (rows, columns)}[wrap]
    return Shift((rows[0], columns[0]), (rows[1], columns[1]))


def _nearest(side: int, draft_side: int, cell: int, share: float) -> tuple[int, int]:
    """Tokens of the picture and of the draft, near a share of either, that are most nearly the same share."""

    def error(tokens: int) -> tuple[float, float]:
        under = tokens * draft_side / side
        return abs(under - round(under)), abs(tokens - share * side)

    nearest = min(range(0, side, cell), key=lambda tokens: abs(tokens - share * side))
    tokens = min((each for each in range(0, side, cell) if abs(each - nearest) <= side / 16), key=error)
    return tokens, round(tokens * draft_side / side)
