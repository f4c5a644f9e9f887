"""Activations too large to be worked on at once: kept where there is room or computed anew, in bands of rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor


class Source(ABC):
    """An activation `[B, C, H, W]` that is read in bands of rows.

    Args:
        shape: B, C, H, W; B is 1 but for tiles whose norms have their statistics in common.
        dtype: its dtype.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.batch, self.channels, self.height, self.width = shape
        self.dtype = dtype

    @abstractmethod
    def rows(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` where they are worked on, `[B, C, stop - start, W]`; rows outside come in at the
        other side."""


class Computed(Source):
    """An activation that is kept nowhere: rows are computed whenever they are read.

    Args:
        compute_rows: `Source.rows`.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, compute_rows: Callable[[int, int], Tensor]) -> None:
        super().__init__(shape, dtype)
        self.compute_rows = compute_rows

    def rows(self, start: int, stop: int) -> Tensor:
        """See `Source.rows`."""
        return self.compute_rows(start, stop)


class Plane(Source):
    """An activation that is kept, row by row, so that a band is one piece of memory and is copied as one.

    Args:
        store: where it is kept.
        compute: where bands of it are worked on.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, store: torch.device, compute: torch.device) -> None:
        super().__init__(shape, dtype)
        self.values = torch.empty(self.height, self.batch, self.channels, self.width, dtype=dtype, device=store)
        self.compute = compute

    @classmethod
    def of(cls, values: Tensor, store: torch.device, compute: torch.device) -> Plane:
        """A plane of these values `[B, C, H, W]`."""
        plane = cls(values.shape, values.dtype, store, compute)
        plane.write(0, values)
        return plane

    def rows(self, start: int, stop: int) -> Tensor:
        """See `Source.rows`."""
        if start >= 0 and stop <= self.height:
            found = self.values[start:stop]
        else:
            found = self.values[torch.arange(start, stop, device=self.values.device) % self.height]
        return found.to(self.compute).permute(1, 2, 0, 3)

    def write(self, start: int, band: Tensor) -> None:
        """Put a band `[B, C, rows, W]` in its place."""
        by_row = band.permute(2, 0, 1, 3).to(self.dtype)
        if self.values.device != band.device:
            by_row = by_row.contiguous()  # one copy over the bus, not one for every row of every channel
        self.values[start : start + len(by_row)].copy_(by_row)


def bands(height: int, row_elements: int, band_elements: int) -> Iterator[tuple[int, int]]:
    """First and last + 1 row of bands of about `band_elements`, at least one row each."""
    rows = max(1, band_elements // max(1, row_elements))
    for start in range(0, height, rows):
        yield start, min(start + rows, height)
