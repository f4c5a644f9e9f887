"""Reading pictures that this project wrote, however large."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import tifffile
import torch
from PIL import Image
from torch import Tensor

BIT_DEPTH_OF_PNG = 24
"""Its byte in the file: behind the signature, the first chunk's head, and two sides."""


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """A picture of any size: Pillow takes those above 179 megapixels for an attack.

    Raises:
        OSError: It cannot be read.
    """
    if path.suffix == ".jxl":
        with suppress(ImportError):
            import pillow_jxl  # noqa: F401  # registers the format
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(path) as picture:
            yield picture
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def picture_bits(path: Path) -> int:
    """Bits a value of a picture file: Pillow reads colours of 16 bits as 8 and says nothing of it.

    Raises:
        OSError: It cannot be read.
    """
    with opened(path) as picture:
        if picture.format == "PNG":
            with path.open("rb") as file:
                return file.read(BIT_DEPTH_OF_PNG + 1)[BIT_DEPTH_OF_PNG]
        if picture.format == "TIFF":
            with tifffile.TiffFile(path) as file:
                return int(file.pages.first.bitspersample)
    return 8


def load_picture(path: Path) -> Tensor:
    """One picture from disk as uint8 `[3, H, W]`."""
    with opened(path) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).contiguous()
