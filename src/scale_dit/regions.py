"""Parts of a picture that are made apart from the rest: chosen windows, and the box of tokens around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import EllipsisType

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from scale_dit.errors import UserError
from scale_dit.grid import Grid
from scale_dit.layout import Layout

Box = tuple[int, int, int, int]
"""Left, top, right and bottom in px, the last two not inside: Pillow's convention."""


@dataclass(frozen=True, eq=False)
class Region:
    """Some windows of a picture, with their surroundings.

    Args:
        rows, columns: the box of tokens in which the base computes.
        chosen: bool `[rows, columns]`: the box's tokens that belong to the chosen windows; the others are read only.
    """

    rows: range
    columns: range
    chosen: Tensor

    @property
    def tokens(self) -> int:
        """Tokens of the box: what a step costs."""
        return len(self.rows) * len(self.columns)

    def crop(self, whole: Tensor, grid: Grid) -> Tensor:
        """The box out of `[..., height, width]`, of which a token of `grid` covers the same number everywhere."""
        return whole[self._box(whole, grid)]

    def paste(self, whole: Tensor, part: Tensor, grid: Grid, weights: Tensor | None = None) -> Tensor:
        """`whole` with the chosen windows of `part`, which is as large as the box.

        Args:
            weights: of `part`, float `[rows, columns]`; 0 outside of the chosen windows. By default 1 in them.
        """
        result, under = whole.clone(), self.crop(whole, grid)
        if weights is None:
            result[self._box(whole, grid)] = torch.where(self.mask(part), part, under)
        else:
            result[self._box(whole, grid)] = under.lerp(part, self._spread(weights, part))
        return result

    def mask(self, part: Tensor) -> Tensor:
        """Where the chosen windows lie in something as large as the box, bool `[height, width]`."""
        return self._spread(self.chosen, part)

    def _spread(self, tokens: Tensor, part: Tensor) -> Tensor:
        """What tokens of the box have, for all that a token covers in something as large as the box."""
        high, wide = part.shape[-2] // len(self.rows), part.shape[-1] // len(self.columns)
        return tokens.to(part.device).repeat_interleave(high, 0).repeat_interleave(wide, 1)

    def _box(self, whole: Tensor, grid: Grid) -> tuple[EllipsisType, slice, slice]:
        high, wide = whole.shape[-2] // grid.height, whole.shape[-1] // grid.width
        rows = slice(self.rows.start * high, self.rows.stop * high)
        return ..., rows, slice(self.columns.start * wide, self.columns.stop * wide)


def moved(latents: Tensor, grid: Grid, tokens: tuple[int, int]) -> Tensor:
    """Latents `[..., h, w]` of a grid, moved by rows and columns of tokens; what leaves comes in at the other side."""
    high, wide = latents.shape[-2] // grid.height, latents.shape[-1] // grid.width
    return latents.roll((tokens[0] * high, tokens[1] * wide), (-2, -1))


def tokens_of_boxes(boxes: Sequence[Box], grid: Grid, token_size: int) -> Tensor:
    """Tokens that any of the boxes touches, bool `[height, width]`.

    Raises:
        UserError: no box, or one that is empty or leaves the picture.
    """
    if not boxes:
        raise UserError("the list of boxes is empty: give boxes=[[left,top,right,bottom]] in px")
    height, width = grid.height * token_size, grid.width * token_size
    touched = torch.zeros(grid.height, grid.width, dtype=torch.bool)
    for box in boxes:
        if len(box) != 4 or not (0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height):
            raise UserError(
                f"the box {list(box)} is not left, top, right, bottom in px inside the picture of {width} x {height}"
            )
        left, top, right, bottom = box
        touched[top // token_size : -(-bottom // token_size), left // token_size : -(-right // token_size)] = True
    return touched


def tokens_of_mask(mask: Tensor, grid: Grid) -> Tensor:
    """Tokens in which a mask, bool `[height, width]` in px, is set anywhere, bool `[height, width]`.

    Raises:
        UserError: the mask is not as large as the picture, or empty.
    """
    token_size = mask.shape[-1] // grid.width
    if token_size < 1 or tuple(mask.shape) != (grid.height * token_size, grid.width * token_size):
        raise UserError(
            f"the mask has {mask.shape[-1]} x {mask.shape[-2]} px, which is not the picture's size ({grid.width} x "
            f"{grid.height} tokens): give a mask as large as the picture"
        )
    if not mask.any():
        raise UserError("the mask is black all over, so nothing would be made: paint white what is to change")
    return mask.unflatten(1, (grid.width, token_size)).unflatten(0, (grid.height, token_size)).any(3).any(1)


def whole_windows(touched: Tensor, layout: Layout) -> Tensor:
    """All tokens of the windows that hold a touched token, bool `[height, width]` as `touched`."""
    result = torch.zeros_like(touched)
    for window in layout.windows:
        rows, columns = (slice(part.start, part.stop) for part in window.queries)
        result[rows, columns] = touched[rows, columns].any()
    return result


def regions_around(layout: Layout, chosen: Tensor, margin: int | None = None) -> list[Region]:
    """Regions that hold all chosen tokens, each in one of them; tokens close together share one.

    Args:
        layout: of the whole picture.
        chosen: tokens, bool `[height, width]`; see `whole_windows`.
        margin: tokens around them that are computed with them, so that their neighbours are known; rounded up to whole
            cells. By default a window.
    """
    cell = layout.image.cell
    margin = (layout.window or 0) if margin is None else margin
    around = _grown(chosen, -(-margin // cell) * cell)
    parts, _ = ndimage.label(around.numpy(), structure=[[1, 1, 1]] * 3)
    regions = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(parts), start=1):
        # From whole cells on, as an order keeps them together.
        box = slice(rows.start // cell * cell, rows.stop), slice(columns.start // cell * cell, columns.stop)
        mine = chosen[box] & torch.from_numpy(parts[box] == number)
        box_rows, box_columns = (range(side.start, side.stop) for side in box)
        regions.append(Region(box_rows, box_columns, mine))
    return regions


def blending(chosen: Tensor, over: int, wrap: str = "none") -> Tensor:
    """Weights in [0, 1] of what is put in where `chosen`, bool `[h, w]`, over what is there.

    They rise from the border inwards, over `over` places, so that nothing outside changes and no line shows. At an edge
    of the picture there is nothing to blend with, unless it joins the opposite one, see `scale_dit.wrapping`.
    """
    if chosen.all():  # there is no border to count from
        return torch.ones(chosen.shape)
    around = np.pad(chosen.numpy(), ((over, over), (0, 0)), mode="wrap" if wrap == "both" else "edge")
    around = np.pad(around, ((0, 0), (over, over)), mode="edge" if wrap == "none" else "wrap")
    depth = torch.from_numpy(ndimage.distance_transform_cdt(around, "chessboard"))[over:-over, over:-over]
    return ((depth - 0.5) / over).clamp(0, 1)


def share_of_boxes(chosen: Tensor, layout: Layout) -> float:
    """Tokens of the boxes around chosen tokens, bool `[height, width]`, as a share of the picture's."""
    return sum(region.tokens for region in regions_around(layout, chosen)) / layout.image.tokens


def _grown(tokens: Tensor, by: int) -> Tensor:
    """Tokens no further than `by` from a set of tokens, along each axis."""
    if by == 0:
        return tokens
    return torch.nn.functional.max_pool2d(tokens[None, None].float(), 2 * by + 1, stride=1, padding=by)[0, 0].bool()
