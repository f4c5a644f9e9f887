"""Pictures that join themselves at their edges: how far every second step sees them moved."""

from __future__ import annotations

from dataclasses import dataclass

from scale_dit.errors import UserError
from scale_dit.grid import Grid

WRAPS = ("none", "horizontal", "both")


@dataclass(frozen=True)
class Shift:
    """How far a picture and its draft are moved, in tokens along rows and columns."""

    image: tuple[int, int]
    draft: tuple[int, int]


def check_wrap(wrap: str) -> None:
    """Refuse an unknown name.

    Raises:
        UserError: `wrap` is unknown.
    """
    if wrap not in WRAPS:
        raise UserError(f"unknown wrap {wrap!r}: use one of {', '.join(WRAPS)}")


def wrap_shift(image: Grid, draft: Grid | None, wrap: str) -> Shift:
    """How far every second step sees a picture moved so that it joins itself: about half of it.

    By whole cells of the picture, and by whole tokens of the draft: as far as their sides allow, by the same share.

    Raises:
        UserError: `wrap` is unknown.
    """
    check_wrap(wrap)
    moved = [
        _half(side, draft_side, image.cell)
        for side, draft_side in zip(
            (image.height, image.width), (draft.height, draft.width) if draft else (1, 1), strict=True
        )
    ]
    wanted = {"none": (0, 0), "horizontal": (0, 1), "both": (1, 1)}[wrap]
    rows, columns = ((move[0] * use, move[1] * use) for move, use in zip(moved, wanted, strict=True))
    return Shift((rows[0], columns[0]), (rows[1], columns[1]))


def _half(side: int, draft_side: int, cell: int) -> tuple[int, int]:
    """Tokens of the picture and of the draft, about half of either, that are most nearly the same share."""

    def error(tokens: int) -> tuple[float, int]:
        share = tokens * draft_side / side
        return abs(share - round(share)), abs(2 * tokens - side)

    nearest = min(range(0, side, cell), key=lambda tokens: abs(2 * tokens - side))
    tokens = min((each for each in range(0, side, cell) if abs(each - nearest) <= side / 8), key=error)
    return tokens, round(tokens * draft_side / side)
