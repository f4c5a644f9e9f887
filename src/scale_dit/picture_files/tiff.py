"""BigTIFF in tiles, band by band: programs read the part of a large picture that they show."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import tifffile

from scale_dit.picture_files.bands import Band, Metadata, regroup

TILE = 512
TILES_AT_ONCE = 2**22
"""Bytes of tiles that are compressed together."""
UNKNOWN = "-"
"""Description of a picture of which nothing is known."""


def write_tiff(
    file: BinaryIO, bands: Iterable[Band], height: int, width: int, bits: int, metadata: Metadata, quality: int | None
) -> None:
    """Write bands `[rows, W, 3]` of a picture of `height` x `width` px; see `PictureFormat.write`."""
    with tifffile.TiffWriter(file, bigtiff=True) as writer:
        writer.write(
            _tiles(bands),
            shape=(height, width, 3),
            dtype=np.uint8 if bits == 8 else np.uint16,
            tile=(TILE, TILE),
            photometric="rgb",
            compression="adobe_deflate",
            predictor=True,
            description=UNKNOWN,
            metadata=None,
            buffersize=TILES_AT_ONCE,
        )
    file.seek(0)
    with tifffile.TiffFile(file, mode="r+") as written:
        written.pages.first.tags["ImageDescription"].overwrite(metadata() or UNKNOWN)


def tiff_description(path: Path) -> str | None:
    """The description in a whole file; `None` if a part of the file is missing."""
    with tifffile.TiffFile(path) as file:
        page = file.pages.first
        end = max(start + count for start, count in zip(page.dataoffsets, page.databytecounts, strict=True))
        if end > path.stat().st_size:
            return None
        return None if page.description == UNKNOWN else page.description


def _tiles(bands: Iterable[Band]) -> Iterator[Band]:
    for band in regroup(bands, TILE):
        for left in range(0, band.shape[1], TILE):
            tile = band[:, left : left + TILE]
            yield np.pad(tile, ((0, TILE - tile.shape[0]), (0, TILE - tile.shape[1]), (0, 0)), mode="edge")
