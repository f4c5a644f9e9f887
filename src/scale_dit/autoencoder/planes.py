"""Activations too large to be worked on at once: kept where there is room or computed anew, in bands of rows."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

PIECE_BYTES = 2**28
"""Of host memory, at most, unless a row is larger."""
AHEAD = 2
"""Bands asked for while earlier ones are worked on: a layer may read two at a time, and the next are to come early."""


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


class Bus:
    """Copies between pinned host memory and a card that run beside the computation.

    Python is ahead of the card, so a band is on its way while the one before it is worked on; it waits when it is
    `AHEAD` bands ahead, or all bands of a picture would be on the card at once.

    Args:
        device: The card.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reading, self.writing = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self.asked: deque[torch.cuda.Event] = deque()

    def fetch(self, parts: Sequence[Tensor], written: Sequence[torch.cuda.Event]) -> Tensor:
        """Parts `[rows, ...]` joined on the card, once what was written to them is there."""
        current = torch.cuda.current_stream(self.device)
        if len(self.asked) == AHEAD:
            self.asked.popleft().synchronize()
        self.asked.append(current.record_event())
        for event in written:
            self.reading.wait_event(event)
        with torch.cuda.stream(self.reading):
            found = parts[0].new_empty(sum(map(len, parts)), *parts[0].shape[1:], device=self.device)
            for part, place in zip(parts, found.split(list(map(len, parts))), strict=True):
                place.copy_(part, non_blocking=True)
        current.wait_stream(self.reading)
        found.record_stream(current)
        return found

    def store(self, band: Tensor, parts: Sequence[Tensor]) -> torch.cuda.Event:
        """Write a contiguous band `[rows, ...]` to its parts; the event tells when it is there."""
        self.writing.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.writing):
            for part, piece in zip(parts, band.split(list(map(len, parts))), strict=True):
                part.copy_(piece, non_blocking=True)
        band.record_stream(self.writing)
        return self.writing.record_event()


class Plane(Source):
    """An activation that is kept, row by row, so that a band is one piece of memory and is copied as one.

    In host memory it is in pieces of equal size: pinned memory is given out in powers of two, and again to the next
    plane, so little of it is left empty, and pinning is paid once.

    Args:
        store: where it is kept.
        compute: where bands of it are worked on.
        bus: takes bands to a card and back; host memory is pinned for it.
    """

    def __init__(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        store: torch.device,
        compute: torch.device,
        bus: Bus | None = None,
    ) -> None:
        super().__init__(shape, dtype)
        row = (self.batch, self.channels, self.width)
        fit = max(1, PIECE_BYTES // max(1, math.prod(row) * dtype.itemsize))
        self.piece_rows = max(1, self.height if store.type != "cpu" else min(fit, self.height))
        self.pieces = [
            torch.empty(
                min(self.piece_rows, self.height - first), *row, dtype=dtype, device=store, pin_memory=bus is not None
            )
            for first in range(0, self.height, self.piece_rows)
        ]
        self.compute, self.bus = compute, bus
        self.writes: list[tuple[int, int, torch.cuda.Event]] = []

    def rows(self, start: int, stop: int) -> Tensor:
        """See `Source.rows`."""
        ranges = list(self._inside(start, stop))
        parts = [part for first, last in ranges for part in self._parts(first, last)]
        if self.bus is not None:
            written = [event for top, end, event in self.writes for first, last in ranges if top < last and first < end]
            return self.bus.fetch(parts, written).permute(1, 2, 0, 3)
        found = parts[0] if len(parts) == 1 else torch.cat(parts)
        return found.to(self.compute).permute(1, 2, 0, 3)

    def write(self, start: int, band: Tensor) -> None:
        """Put a band `[B, C, rows, W]` in its place."""
        by_row = band.permute(2, 0, 1, 3).to(self.dtype)
        parts = self._parts(start, start + len(by_row))
        if self.bus is not None and band.is_cuda:
            self.writes.append((start, start + len(by_row), self.bus.store(by_row.contiguous(), parts)))
            return
        if parts[0].device != band.device:
            by_row = by_row.contiguous()  # one copy over the bus, not one for every row of every channel
        for part, piece in zip(parts, by_row.split(list(map(len, parts))), strict=True):
            part.copy_(piece)

    def _inside(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Rows as ranges of those that there are."""
        while start < stop:
            first = start % self.height
            last = min(self.height, first + stop - start)
            yield first, last
            start += last - first

    def _parts(self, start: int, stop: int) -> list[Tensor]:
        """Rows that there are, as parts of the pieces."""
        each = self.piece_rows
        numbers = range(start // each, -(-stop // each))
        return [self.pieces[number][max(0, start - number * each) : stop - number * each] for number in numbers]


def bands(height: int, row_elements: int, band_elements: int) -> Iterator[tuple[int, int]]:
    """First and last + 1 row of bands of about `band_elements`, at least one row each."""
    rows = max(1, band_elements // max(1, row_elements))
    for start in range(0, height, rows):
        yield start, min(start + rows, height)
