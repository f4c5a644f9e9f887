"""The method as a user sets it, and what it comes to for one picture size on one base."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from scale_dit import anchors as anchor_positions
from scale_dit.errors import UserError
from scale_dit.grid import Grid, guidance_grid
from scale_dit.layout import Layout
from scale_dit.models.settings import BaseSettings


@dataclass(frozen=True)
class Method:
    """Every switch of Scale-DiT. Lengths are in tokens or cells, never in px, so that one method fits every base.

    Args:
        scale: HR side / guidance side.
        window: Window side in tokens; `None` is the base's own.
        windowed: `False` is one window over the whole picture, that is dense attention.
        halo_cells: How many cells an HR window's keys reach beyond the window.
        shift_windows: Displace the window borders by half a window in every second block.
        guidance: Whether HR tokens read the draft.
        scope: Which guidance tokens a window reads: `aligned` or `global`.
        guidance_tokens: Reduce the draft to at most this many tokens; `None` keeps HR / scale.
        guidance_reach: Which guidance tokens a guidance token reads: `adjacent` cells or `all`.
        order: Memory order of the tokens.
        anchors: Rotary positions of the guidance tokens.
        ntk: Factor on the rotary base for sizes beyond training (1: unchanged).
        yarn: How many times longer than those of training pictures are, for YaRN's rotary frequencies (1: unchanged).
    """

    scale: float = 4.0
    window: int | None = None
    windowed: bool = True
    halo_cells: int = 1
    shift_windows: bool = False
    guidance: bool = True
    scope: str = "aligned"
    guidance_tokens: int | None = None
    guidance_reach: str = "adjacent"
    order: str = "hilbert"
    anchors: str = "scaled"
    ntk: float = 1.0
    yarn: float = 1.0

    def __post_init__(self) -> None:
        if not self.ntk > 0:
            raise UserError(f"The NTK factor is {self.ntk}, but it must be positive: method.ntk=1 changes nothing.")
        if not self.yarn >= 1:
            raise UserError(
                f"The YaRN factor is {self.yarn}, but it must be at least 1: method.yarn=1 changes nothing."
            )
        if self.ntk != 1 and self.yarn != 1:
            raise UserError(
                f"method.ntk={self.ntk} and method.yarn={self.yarn} exclude each other: set one of them to 1."
            )

    def plan(self, base: BaseSettings, height: int, width: int) -> Plan:
        """What the method comes to for a picture of `height` x `width` px on `base`.

        Raises:
            UserError: A size, window, order, anchor or scope that cannot be; named with what is allowed.
        """
        image = Grid.from_pixels(height, width, base.token_size, base.cell)
        draft = guidance_grid(image, self.scale, self.guidance_tokens) if self.guidance else None
        window = (self.window if self.window is not None else base.window) if self.windowed else None
        layout = Layout(
            text=base.text_length,
            image=image,
            guidance=draft,
            window=window,
            halo=self.halo_cells * base.cell if self.windowed else 0,
            scope=self.scope,
            order=self.order,
        )
        return Plan(
            self, layout, anchor_positions.image_ids(layout), anchor_positions.guidance_ids(layout, self.anchors)
        )

    @property
    def summary(self) -> dict[str, object]:
        """What a LoRA was trained for, as its file's metadata states it."""
        keys = ("scale", "window", "halo_cells", "scope", "guidance_tokens", "guidance_reach", "anchors")
        return {key: getattr(self, key) for key in keys}


def draft_plan(base: BaseSettings, height: int, width: int, scale: float) -> Plan:
    """The plan of the draft under a picture of `height` x `width` px: one window, it reads but text and itself."""
    full = guidance_grid(Grid.from_pixels(height, width, base.token_size, base.cell), scale)
    method = Method(windowed=False, guidance=False, order="raster")
    return method.plan(base, full.height * base.token_size, full.width * base.token_size)


@dataclass(frozen=True, eq=False)
class Plan:
    """Layouts, token order and rotary ids of one picture.

    Attributes:
        layout: Who reads whom, in blocks of even index.
        image_ids: Time, row and column of the image tokens, `[N, 3]` float32, in memory order.
        guidance_ids: Time, row and column of the guidance tokens, `[L, 3]` float32, in memory order.
    """

    method: Method
    layout: Layout
    image_ids: Tensor
    guidance_ids: Tensor

    def __post_init__(self) -> None:
        # Now and not in the middle of sampling: these refuse windows that cannot be shifted and an unknown reach.
        _ = self.layouts
        if self.layout.guidance is not None:
            _ = self.guidance_layout

    @cached_property
    def layouts(self) -> tuple[Layout, Layout]:
        """The layouts of even and of odd blocks."""
        if not self.method.shift_windows or self.layout.window is None:
            return self.layout, self.layout
        half = self.layout.window // 2
        if half % self.layout.image.cell:
            raise UserError(
                f"Windows of {self.layout.window} tokens cannot be shifted by half: half a window must be a multiple "
                f"of the cell ({self.layout.image.cell}); use window.size={2 * self.layout.window} or "
                f"window.shift=false."
            )
        return self.layout, replace(self.layout, shift=half)

    def box(self, rows: range, columns: range) -> Plan:
        """The plan of a part of the picture alone, in which tokens keep their rotary ids and read the whole draft.

        Args:
            rows, columns: Tokens of the picture, from whole cells on.

        Raises:
            UserError: See `Layout.box`.
        """
        layout, grid = self.layout.box(rows, columns), self.layout.image
        raster = torch.arange(grid.tokens).view(grid.height, grid.width)
        tokens = raster[rows.start : rows.stop, columns.start : columns.stop].flatten()[layout.image_order]
        places = self.layout.image_order.argsort()[tokens]
        return replace(self, layout=layout, image_ids=self.image_ids[places])

    @cached_property
    def guidance_layout(self) -> Layout:
        """Who reads whom in the guidance pass."""
        if self.layout.guidance is None:
            raise ValueError("this plan has no guidance tokens")
        return Layout.for_guidance(self.layout.guidance, self.method.guidance_reach, self.method.order)
