"""Activations too large to be worked on at once: kept where there is room, read and written in bands of rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


class Plane:
    """An activation `[1, C, H, W]`.

    Args:
        channels, height, width: its sizes.
        dtype: its dtype.
        store: where it is kept.
        compute: where bands of it are worked on.
    """

    def __init__(
        self, channels: int, height: int, width: int, dtype: torch.dtype, store: torch.device, compute: torch.device
    ) -> None:
        self.values = torch.empty(1, channels, height, width, dtype=dtype, device=store)
        self.compute = compute

    @classmethod
    def of(cls, values: Tensor, store: torch.device, compute: torch.device) -> Plane:
        """A plane of these values."""
        _, channels, height, width = values.shape
        plane = cls(channels, height, width, values.dtype, store, compute)
        plane.values.copy_(values)
        return plane

    @property
    def channels(self) -> int:
        """C."""
        return self.values.shape[1]

    @property
    def height(self) -> int:
        """H."""
        return self.values.shape[2]

    @property
    def width(self) -> int:
        """W."""
        return self.values.shape[3]

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` where they are worked on, `[1, C, stop - start, W]`; rows outside come in at the
        other side."""
        if start >= 0 and stop <= self.height:
            return self.values[:, :, start:stop].to(self.compute)
        places = torch.arange(start, stop, device=self.values.device) % self.height
        return self.values[:, :, places].to(self.compute)

    def write(self, start: int, band: Tensor) -> None:
        """Put a band in its place."""
        self.values[:, :, start : start + band.shape[2]] = band.to(self.values.device, self.values.dtype)


def bands(height: int, row_elements: int, band_elements: int) -> Iterator[tuple[int, int]]:
    """First and last + 1 row of bands of about `band_elements`, at least one row each."""
    rows = max(1, band_elements // max(1, row_elements))
    for start in range(0, height, rows):
        yield start, min(start + rows, height)
