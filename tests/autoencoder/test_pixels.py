"""Bands as whole numbers."""

from __future__ import annotations

import numpy
import pytest
import torch

from scale_dit.autoencoder.pixels import integer_bands
from scale_dit.errors import UserError


@pytest.mark.parametrize(("bits", "dtype"), [(8, numpy.uint8), (16, numpy.uint16)])
def test_every_level_comes_back(bits, dtype):
    """All levels, also when they are less than half a level off: what is cut instead of rounded fails."""
    levels = torch.arange(2**bits, dtype=torch.float64)
    for shift in (-0.49, 0.0, 0.49):
        values = ((levels + shift) / (2**bits - 1)).clamp(0, 1).float().reshape(1, 1, 16, -1)
        first, second = values.expand(1, 3, 16, -1).split([7, 9], dim=2)
        bands = list(integer_bands([(0, first), (7, second)], bits))
        assert [band.dtype for band in bands] == [dtype, dtype]
        assert [len(band) for band in bands] == [7, 9]
        found = numpy.concatenate(bands)
        assert found.shape == (16, 2**bits // 16, 3)
        assert (found[..., 1].reshape(-1) == levels.numpy()).all()


def test_other_numbers_of_bits_are_refused():
    with pytest.raises(UserError, match="12 bits a channel: use 8 or 16"):
        integer_bands([], 12)
