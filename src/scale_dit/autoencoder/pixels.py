"""Finished bands of a picture as whole numbers, as files hold them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy
import torch
from torch import Tensor

from scale_dit.errors import UserError

KINDS = {8: numpy.uint8, 16: numpy.uint16}


def integer_bands(bands: Iterable[tuple[int, Tensor]], bits: int = 8) -> Iterator[numpy.ndarray]:
    """Bands from `decode_bands` as rows of a file, so that a picture of any size is written while it is decoded.

    Args:
        bands: First row and `[1, 3, rows, W]` in [0, 1], from the top without gaps.
        bits: 8 or 16 a channel.

    Yields:
        `[rows, W, 3]`, uint8 or uint16, rounded to the nearest.

    Raises:
        UserError: Another number of bits.
    """
    if bits not in KINDS:
        raise UserError(f"pictures cannot have {bits} bits a channel: use 8 or 16")
    return (_integers(band, bits) for _, band in bands)


def _integers(band: Tensor, bits: int) -> numpy.ndarray:
    """Rounded where it was decoded, so that no more than these bits go to the host's memory."""
    # torch computes little with uint16; int32 holds both.
    levels = (band[0].permute(1, 2, 0) * (2**bits - 1)).round()
    whole = levels.to(torch.uint8 if bits == 8 else torch.int32).contiguous().cpu().numpy()
    return whole.astype(KINDS[bits], copy=False)
