"""Windows along one axis and over the picture: which spans of tokens a window queries, reads, and is guided by."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple


class Span(NamedTuple):
    """A window along one axis, in tokens of the picture (queries, keys) and of the draft (guidance)."""

    queries: range
    keys: range
    guidance: range


class Rectangle(NamedTuple):
    """Some rows and columns of a grid, in tokens."""

    rows: range
    columns: range

    @property
    def tokens(self) -> int:
        """Tokens inside."""
        return len(self.rows) * len(self.columns)


class Window(NamedTuple):
    """What the queries of one window read besides the text; `guidance` is empty where there is none."""

    queries: Rectangle
    keys: Rectangle
    guidance: Rectangle

    @classmethod
    def crossing(cls, row: Span, column: Span) -> Window:
        """The window where a span of rows crosses a span of columns."""
        return cls(*map(Rectangle, row, column))


def spans(
    side: int, guidance_side: int, *, cell: int, window: int | None, halo: int, shift: int, scope: str
) -> tuple[Span, ...]:
    """The windows along one axis of `side` tokens, over a draft of `guidance_side` tokens. Their queries part it."""
    window = window or side
    borders = [0, *range(shift or window, side, window), side]
    return tuple(
        Span(
            range(start, stop),
            range(max(0, start - halo), min(side, stop + halo)),
            range(guidance_side) if scope == "global" else _aligned(start + stop, side, guidance_side, cell),
        )
        for start, stop in pairwise(borders)
    )


def cut(whole: tuple[Span, ...], start: int, stop: int) -> tuple[Span, ...]:
    """What is left of the windows along an axis inside `start` to `stop`, counted from `start`; guidance stays."""

    def inside(tokens: range) -> range:
        return range(max(tokens.start, start) - start, min(tokens.stop, stop) - start)

    kept = [span for span in whole if span.queries.start < stop and span.queries.stop > start]
    return tuple(Span(inside(span.queries), inside(span.keys), span.guidance) for span in kept)


def _aligned(twice_centre: int, side: int, guidance_side: int, cell: int) -> range:
    """The two cells of the draft nearest to a window whose centre is at `twice_centre / 2` of `side` tokens."""
    cells = -(-guidance_side // cell)
    if cells <= 2:
        return range(guidance_side)
    # The nearest border between cells, floor(centre / (cell * side / guidance_side) + 1/2), in exact integers.
    border = (twice_centre * guidance_side + side * cell) // (2 * side * cell)
    border = min(max(border, 1), cells - 1)
    return range((border - 1) * cell, min((border + 1) * cell, guidance_side))
