"""Who reads whom: the one source of every mask, tile list, index and FLOP count.

A layout is a few integers. Windows, their grown neighbourhoods and their guidance patches are rectangles, and each
rectangle is the product of two spans, one per axis; so everything is worked out from the sides of the picture, at any
size, and nothing of size S x S is made unless it is asked for.

    query     reads text      image                             guidance
    text      all             all (or none)                     none
    image     all             its window grown by the halo      a patch under the window (aligned) or all (global)
    guidance  (a layout of its own, see `Layout.for_guidance`)

"Memory order" is the order in which tokens are laid out (see `order.py`).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property, lru_cache
from itertools import product
from json import dumps, loads
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from scale_dit import order as orders
from scale_dit.errors import UserError
from scale_dit.grid import Grid
from scale_dit.layout_checks import check_box, check_sizes
from scale_dit.windows import Span, Window, cut, spans

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from scale_dit.tiles import Tiles

REACHES = ("adjacent", "all")
DENSE_MASK_LIMIT = 2**28
"""Largest dense mask that is built, in entries (256 MiB of booleans)."""


class Group(NamedTuple):
    """Windows of equal counts, as places in memory: ready for one batched gather.

    Each row is ascending, and rows are sorted by their first query.
    """

    queries: Tensor
    """int64 `[windows, query tokens]`, places among the image tokens."""
    keys: Tensor
    """int64 `[windows, key tokens]`, places among the image tokens."""
    guidance: Tensor
    """int64 `[windows, guidance tokens]`, places among the guidance tokens; no columns without guidance."""


class Pairs(NamedTuple):
    """Numbers of (query, key) pairs by part, for one sample and one head."""

    text_rows: int
    image_to_text: int
    image_to_image: int
    image_to_guidance: int


@dataclass(frozen=True)
class Layout:
    """Who reads whom among `text` text tokens, the picture's tokens and the draft's (guidance) tokens.

    Args:
        text: number of text tokens T.
        image: the picture's grid, N tokens.
        guidance: the draft's grid, L tokens; `None`: no guidance.
        window: side of a window in tokens, a multiple of the cell; `None`: one window, the whole picture.
        halo: how far the keys of a window reach beyond it, in tokens, a multiple of the cell. Every token then reads
            all tokens within this (Chebyshev) distance.
        shift: displacement of the window borders in tokens, a multiple of the cell below the window.
        scope: guidance that a window reads: `aligned`, the 2 x 2 cells nearest to its centre, or `global`, all.
        text_reads_image: whether text rows read the image, as in the base model.
        order: memory order of the image and guidance tokens, a name from `order.ORDERS`.
        whole: the grid of a larger picture that `image` is only a box of, see `box`; `None`: there is none.
        top, left: where the box begins in it, in tokens.

    Raises:
        UserError: naming the value, what is allowed and the remedy.
    """

    text: int
    image: Grid
    guidance: Grid | None = None
    window: int | None = None
    halo: int = 0
    shift: int = 0
    scope: str = "aligned"
    text_reads_image: bool = True
    order: str = "window"
    whole: Grid | None = None
    top: int = 0
    left: int = 0
    json: str = field(init=False, repr=False, compare=False)
    """The layout as text, for operators of torch, which take no objects; see `from_json`."""

    def __post_init__(self) -> None:
        check_sizes(self)
        given = {part.name: getattr(self, part.name) for part in fields(self) if part.init}
        object.__setattr__(self, "json", dumps(given, default=asdict))

    @classmethod
    def from_json(cls, text: str) -> Layout:
        """The layout whose `json` this is. Cached."""
        return _from_json(text)

    @classmethod
    def for_guidance(cls, guidance: Grid, reach: str = "adjacent", order: str = "window") -> Layout:
        """The layout of the guidance pass, in which the draft's tokens are the image and there is no text.

        Every cell reads itself and the adjacent cells, or with `reach="all"` everything.

        Raises:
            UserError: if `reach` or `order` is unknown.
        """
        if reach not in REACHES:
            raise UserError(f"Unknown guidance reach '{reach}': use one of {', '.join(REACHES)}.")
        if reach == "all":
            return cls(0, guidance, order=order)
        return cls(0, guidance, window=guidance.cell, halo=guidance.cell, order=order)

    def box(self, rows: range, columns: range) -> Layout:
        """The same for a part of the picture alone, as if nothing were around it; guidance is the whole draft's.

        Args:
            rows, columns: tokens of the picture, from whole cells on.

        Raises:
            UserError: the box leaves the picture, begins within a cell, or is cut from another box.
        """
        check_box(self, rows, columns)
        grid = self.image
        box = Grid(len(rows), len(columns), grid.cell)
        return replace(self, image=box, whole=grid, top=rows.start, left=columns.start)

    @property
    def is_dense(self) -> bool:
        """Whether every row reads every key, so that the layout is plain joint attention."""
        one_window = len(self.windows) == 1
        return one_window and self.guidance is None and (self.text_reads_image or self.text == 0)

    @property
    def guidance_tokens(self) -> int:
        """L."""
        return self.guidance.tokens if self.guidance else 0

    @property
    def image_order(self) -> Tensor:
        """Raster index of the image token at each place in memory, int64 `[N]`. Cached, read-only."""
        return orders.permutation(self.image, self.order, self.window)

    @property
    def guidance_order(self) -> Tensor:
        """Raster index of the guidance token at each place in memory, int64 `[L]`. Cached, read-only."""
        if self.guidance is None:
            raise ValueError("This layout has no guidance tokens.")
        return orders.permutation(self.guidance, self.order, self.guidance.cell)

    @cached_property
    def windows(self) -> tuple[Window, ...]:
        """All windows in raster order. Their queries part the picture."""
        return tuple(Window.crossing(row, column) for row, column in product(*self.axes))

    @cached_property
    def axes(self) -> tuple[tuple[Span, ...], tuple[Span, ...]]:
        """The windows along the rows and along the columns of the picture."""
        shape = {name: getattr(self, name) for name in ("window", "halo", "shift", "scope")}
        draft = (self.guidance.height, self.guidance.width) if self.guidance else (0, 0)
        picture = self.whole or self.image
        rows, columns = (
            spans(side, guidance_side, cell=self.image.cell, **shape)
            for side, guidance_side in zip((picture.height, picture.width), draft, strict=True)
        )
        if self.whole is None:
            return rows, columns
        bottom, right = self.top + self.image.height, self.left + self.image.width
        return cut(rows, self.top, bottom), cut(columns, self.left, right)

    def groups(self) -> tuple[Group, ...]:
        """The windows by equal numbers of query, image key and guidance key tokens. Cached, read-only."""
        return _groups(self)

    def dense_mask(self) -> Tensor:
        """Who reads whom, bool `[T + N, T + N + L]`, rows and columns in memory order: text, image, guidance.

        Raises:
            UserError: if the mask would have more than `DENSE_MASK_LIMIT` entries.
        """
        rows = self.text + self.image.tokens
        columns = rows + self.guidance_tokens
        if rows * columns > DENSE_MASK_LIMIT:
            raise UserError(
                f"A dense mask of {rows:,} x {columns:,} entries is too large (limit {DENSE_MASK_LIMIT:,}): use a "
                f"smaller picture, or an attention backend other than 'reference'."
            )
        mask = torch.zeros(rows, columns, dtype=torch.bool)
        mask[:, : self.text] = True
        mask[: self.text, self.text : rows] = self.text_reads_image
        for group in self.groups():
            keys = torch.cat([group.keys + self.text, group.guidance + rows], dim=1)
            mask[group.queries[:, :, None] + self.text, keys[:, None, :]] = True
        return mask

    def attention_pairs(self) -> Pairs:
        """How many (query, key) pairs one head computes, from the sides alone: microseconds at any size."""
        rows, columns = self.axes
        image_to_image, image_to_guidance = (
            sum(len(span.queries) * len(getattr(span, part)) for span in rows)
            * sum(len(span.queries) * len(getattr(span, part)) for span in columns)
            for part in ("keys", "guidance")
        )
        text_keys = self.text + self.image.tokens * self.text_reads_image
        return Pairs(self.text * text_keys, self.image.tokens * self.text, image_to_image, image_to_guidance)

    def flops(self, heads: int, head_dim: int) -> int:
        """Floating-point operations of one attention layer, forward, one sample: 4 pairs H D (two products)."""
        return 4 * sum(self.attention_pairs()) * heads * head_dim

    def tiles(self, block_m: int, block_n: int) -> Tiles:
        """Which tiles of `block_m` image queries x `block_n` keys a kernel must visit. See `tiles.py`."""
        from scale_dit.tiles import tiles

        return tiles(self, block_m, block_n)

    def block_mask(self, device: torch.device | str = "cpu") -> BlockMask:
        """The image rows as FlexAttention's block mask. See `tiles.py`."""
        from scale_dit.tiles import block_mask

        return block_mask(self, torch.device(device))

    def __str__(self) -> str:
        pairs, tokens = self.attention_pairs(), self.image.tokens
        window = f"windows of {self.window}" if self.window else "one window"
        place = f" (from {self.top}, {self.left} of {self.whole.height} x {self.whole.width})" if self.whole else ""
        return (
            f"{self.text} text, {self.image.height} x {self.image.width}{place} image, {self.guidance_tokens} guidance "
            f"tokens; {window}, halo {self.halo}, shift {self.shift}, {self.scope} guidance, {self.order} order; "
            f"an image row reads {self.text} text, {pairs.image_to_image / tokens:,.0f} image and "
            f"{pairs.image_to_guidance / tokens:,.0f} guidance keys on average"
        )


@lru_cache(maxsize=32)
def _groups(layout: Layout) -> tuple[Group, ...]:
    image = _places(layout.image, layout.image_order)
    no_places = torch.empty(0, 0, dtype=torch.long)
    guidance = _places(layout.guidance, layout.guidance_order) if layout.guidance else no_places
    members = defaultdict(list)
    for row, column in product(*map(_alike, layout.axes)):
        parts = [_within(*each) for each in zip((image, image, guidance), row, column, strict=True)]
        members[tuple(part.shape[1] for part in parts)].append(parts)
    joined = [[torch.cat(parts) for parts in zip(*alike, strict=True)] for alike in members.values()]
    return tuple(Group(*(part[parts[0][:, 0].argsort()] for part in parts)) for parts in joined)


def _alike(axis: tuple[Span, ...]) -> list[tuple[Tensor, ...]]:
    """Rows, or columns, of the queries, keys and guidance keys of windows: `[spans, each]`, by how many they are."""
    members = defaultdict(list)
    for span in axis:
        members[len(span.queries), len(span.keys), len(span.guidance)].append(span)
    return [
        tuple(torch.tensor([list(getattr(span, part)) for span in alike], dtype=torch.long) for part in Span._fields)
        for alike in members.values()
    ]


def _places(grid: Grid, permutation: Tensor) -> Tensor:
    """Place in memory of every token of a grid, `[H, W]`."""
    return permutation.argsort().view(grid.height, grid.width)


def _within(places: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Places in memory, ascending, of the tokens in rows `[R, a]` and columns `[C, b]`, crossed: `[R C, a b]`."""
    found = places[rows[:, None, :, None], columns[None, :, None, :]]
    return found.flatten(2).flatten(0, 1).sort(dim=1).values


@lru_cache(maxsize=256)
def _from_json(text: str) -> Layout:
    given = loads(text)
    grids = {name: Grid(**given[name]) for name in ("image", "guidance", "whole") if given[name]}
    return Layout(**{**given, **grids})
