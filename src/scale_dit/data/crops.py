"""Where a training picture is cut out of a photograph, and how far it zooms in."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from scale_dit.data.buckets import Size, bucket_sizes, check_size, nearest_bucket
from scale_dit.data.decode import Box, PictureError
from scale_dit.errors import UserError

PLACES = ("random", "centre")


@dataclass(frozen=True)
class Crops:
    """Cuts of the base's native size.

    At zoom 1 the cut is the widest that fits into the photograph; at zoom z its sides are a z-th of that. Zooms are
    drawn log-uniformly: every doubling of scale is equally frequent, as in photographs. Zooming stops at the
    photograph's own pixels: the range is shortened, nothing is enlarged.

    Args:
        size: pixels: one number for a square, or (height, width).
        token: pixels a side that one token covers; sides are multiples of it.
        place: `random` or `centre`.
        zoom_low: least zoom, at least 1.
        zoom_high: greatest zoom; None: down to the photograph's own pixels.
        aspect_buckets: cut in the shape nearest to the photograph's, of about equal area; needs a square `size`.
        max_aspect: longest over shortest side of these shapes.
        enlarge: use photographs smaller than the cut too, enlarged. Otherwise they are skipped, by name.

    Raises:
        UserError: naming the value that is not allowed.
    """

    size: int | tuple[int, int] = 256
    token: int = 16
    place: str = "random"
    zoom_low: float = 1.0
    zoom_high: float | None = 1.0
    aspect_buckets: bool = False
    max_aspect: float = 2.0
    enlarge: bool = False

    def __post_init__(self) -> None:
        if self.place not in PLACES:
            raise UserError(f"unknown place {self.place!r} for crops; choose one of {', '.join(PLACES)}")
        if self.zoom_low < 1:
            raise UserError(f"zoom_low={self.zoom_low} must be at least 1, where the cut is the widest that fits")
        if self.zoom_high is not None and self.zoom_high < self.zoom_low:
            raise UserError(f"zoom_high={self.zoom_high} is below zoom_low={self.zoom_low}; raise it, or give null")
        height, width = self._height_width
        if self.aspect_buckets and height != width:
            raise UserError(f"aspect_buckets need a square size, not {height}x{width}; give one number")
        check_size((height, width), self.token)

    @property
    def _height_width(self) -> Size:
        if isinstance(self.size, int):
            return self.size, self.size
        height, width = self.size
        return int(height), int(width)

    @cached_property
    def sizes(self) -> tuple[Size, ...]:
        """(height, width) of each bucket; one bucket without `aspect_buckets`."""
        if self.aspect_buckets:
            return bucket_sizes(self._height_width[0], self.token, self.max_aspect)
        return (self._height_width,)

    def bucket(self, height: int, width: int) -> int:
        """Index into `sizes` for a photograph of this size.

        Raises:
            PictureError: the photograph is smaller than its bucket and `enlarge` is off.
        """
        bucket = nearest_bucket(height, width, self.sizes)
        if not self.enlarge and self._widest(height, width, bucket) < 1:
            wanted = "{}x{}".format(*self.sizes[bucket])
            raise PictureError(
                f"{height}x{width} px is smaller than the crop of {wanted} px (enlarge=True would use it)"
            )
        return bucket

    def box(self, height: int, width: int, bucket: int, random: np.random.Generator) -> Box:
        """(left, top, right, bottom) of one cut, in pixels of the photograph. `centre` still draws the zoom."""
        widest = self._widest(height, width, bucket)
        limit = max(1.0, widest)
        high = limit if self.zoom_high is None else min(self.zoom_high, limit)
        low = min(self.zoom_low, high)
        step = widest / math.exp(random.uniform(math.log(low), math.log(high)))
        cut_height, cut_width = (side * step for side in self.sizes[bucket])
        down, along = random.uniform(size=2) if self.place == "random" else (0.5, 0.5)
        top, left = max(0.0, height - cut_height) * down, max(0.0, width - cut_width) * along
        return left, top, min(float(width), left + cut_width), min(float(height), top + cut_height)

    def description(self) -> dict[str, Any]:
        """Plain values that decide which pixels are cut, for a cache's fingerprint."""
        return asdict(self) | {"size": list(self._height_width)}

    def _widest(self, height: int, width: int, bucket: int) -> float:
        """Pixels of the photograph along one pixel of the widest cut."""
        cut_height, cut_width = self.sizes[bucket]
        return min(height / cut_height, width / cut_width)
