"""Pictures as bands of rows, so that a large one need not exist at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Band = NDArray[np.unsignedinteger]
"""Some whole rows of a picture, `[rows, W, 3]`, 8 or 16 bits a value."""

Metadata = Callable[[], str | None]
"""Text for a picture's file, known when the last band is."""


class NotFiniteError(ValueError):
    """A picture holds NaN or infinity."""


def to_uint8(images: Tensor) -> Tensor:
    """Float pictures in [0, 1] as uint8, clamped and rounded; uint8 passes unchanged.

    Truncation would wrap 1.004 round to 0, which metric libraries do when left to convert by themselves.

    Raises:
        NotFiniteError: a value is not finite.
    """
    if images.dtype == torch.uint8:
        return images
    return _levels(images, 255).to(torch.uint8)


def to_float(images: Tensor) -> Tensor:
    """uint8 pictures as float32 in [0, 1]; float passes as float32, clamped."""
    if images.dtype == torch.uint8:
        return images.float() / 255
    return images.float().clamp(0, 1)


def quantise(bands: Iterable[Tensor], bits: int) -> Iterator[Band]:
    """Bands `[3, rows, W]` in [0, 1], or uint8, as bands of 8 or 16 bits.

    Raises:
        NotFiniteError: a value is not finite.
    """
    for band in bands:
        if bits == 8:
            values = to_uint8(band).cpu().numpy()
        else:
            values = _levels(band, 65535).to(torch.int32).cpu().numpy().astype(np.uint16)
        yield np.ascontiguousarray(values.transpose(1, 2, 0))


def regroup(bands: Iterable[Band], rows: int) -> Iterator[Band]:
    """The same picture in bands of `rows` rows; the last one may be smaller."""
    waiting: list[Band] = []
    count = 0
    for band in bands:
        waiting.append(band)
        count += len(band)
        if count >= rows:
            joined = np.concatenate(waiting)
            whole = count - count % rows
            yield from (joined[top : top + rows] for top in range(0, whole, rows))
            waiting, count = [joined[whole:]], count - whole
    if count:
        yield np.concatenate(waiting)


def _levels(images: Tensor, highest: int) -> Tensor:
    if not torch.isfinite(images).all():
        raise NotFiniteError("the pictures hold NaN or infinity: look at the model that made them before measuring")
    return (images.float().clamp(0, 1) * highest).round()
