"""PNG, band by band (W3C PNG specification, third edition): 8 or 16 bits, metadata as international text."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import PngImagePlugin

from scale_dit.picture_files.bands import Band, Metadata

SIGNATURE = b"\x89PNG\r\n\x1a\n"
KEYWORD = "scale_dit"
LONGEST_TEXT = PngImagePlugin.MAX_TEXT_CHUNK
"""Readers refuse longer ones, Pillow among them."""
UP = 2
COMPRESSION = 3


def write_png(
    file: BinaryIO, bands: Iterable[Band], height: int, width: int, bits: int, metadata: Metadata, quality: int | None
) -> None:
    """Write bands `[rows, W, 3]` of a picture of `height` x `width` px; see `PictureFormat.write`."""
    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    file.write(SIGNATURE + _chunk(b"IHDR", header))
    compressor = zlib.compressobj(COMPRESSION)
    for rows in _filtered(bands, width * 3 * bits // 8):
        if data := compressor.compress(rows):
            file.write(_chunk(b"IDAT", data))
    file.write(_chunk(b"IDAT", compressor.flush()))
    if (text := metadata()) is not None:
        file.write(_chunk(b"iTXt", KEYWORD.encode() + b"\0\0\0\0\0" + text.encode()))
    file.write(_chunk(b"IEND", b""))


def _filtered(bands: Iterable[Band], row_bytes: int) -> Iterator[bytes]:
    """Rows of bytes behind the number of their filter: differences to the row above."""
    above = np.zeros((1, row_bytes), np.uint8)
    for band in bands:
        rows: NDArray[np.uint8] = band.astype(band.dtype.newbyteorder(">"), copy=False).view(np.uint8)
        rows = rows.reshape(len(band), row_bytes)
        filtered = np.empty((len(band), 1 + row_bytes), np.uint8)
        filtered[:, 0] = UP
        np.subtract(rows, np.concatenate([above, rows[:-1]]), out=filtered[:, 1:])
        above = rows[-1:]
        yield filtered.tobytes()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
