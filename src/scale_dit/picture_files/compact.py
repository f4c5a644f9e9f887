"""WebP and JPEG XL through Pillow, whose encoders take a whole picture of 8 bits."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from scale_dit.picture_files.bands import Band, Metadata

DESCRIPTION = 0x010E
"""EXIF's ImageDescription, of ASCII."""
JXL_PACKAGE = "pillow-jxl-plugin"


def write_webp(
    file: BinaryIO, bands: Iterable[Band], height: int, width: int, bits: int, metadata: Metadata, quality: int | None
) -> None:
    """Write bands `[rows, W, 3]` of a picture of `height` x `width` px; see `PictureFormat.write`."""
    options: dict[str, Any] = {"lossless": True, "quality": 20} if quality is None else {"quality": quality}
    picture = _picture(bands)
    picture.save(file, format="WEBP", exif=_exif(metadata()), method=2, **options)


def write_jxl(
    file: BinaryIO, bands: Iterable[Band], height: int, width: int, bits: int, metadata: Metadata, quality: int | None
) -> None:
    """Write bands `[rows, W, 3]` of a picture of `height` x `width` px; see `PictureFormat.write`."""
    import pillow_jxl  # noqa: F401  # registers the format

    options: dict[str, Any] = {"lossless": True} if quality is None else {"quality": quality}
    picture = _picture(bands)
    picture.save(file, format="JXL", exif=_exif(metadata()), effort=3, **options)


def jxl_missing() -> str | None:
    """Why JPEG XL cannot be written here, and what to do about it."""
    if find_spec("pillow_jxl") is not None:
        return None
    return f"JPEG XL needs the package {JXL_PACKAGE}: pip install {JXL_PACKAGE}, or use another format"


def _picture(bands: Iterable[Band]) -> Image.Image:
    return Image.fromarray(np.concatenate(list(bands)))


def _exif(metadata: str | None) -> bytes:
    exif = Image.Exif()
    if metadata is not None:
        exif[DESCRIPTION] = metadata
    return exif.tobytes()
