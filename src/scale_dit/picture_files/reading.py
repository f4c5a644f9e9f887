"""Reading pictures as large as those that this project writes, which Pillow takes for attacks."""

from __future__ import annotations

import threading
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


class _PillowsLimit:
    """Pillow's limit of 179 megapixels, which is that of the whole process."""

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._own: int | None = None

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """There is none until the last thread leaves."""
        with self._lock:
            if self._inside == 0:
                self._own, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    Image.MAX_IMAGE_PIXELS = self._own


without_pillows_limit = _PillowsLimit().lifted
"""A context in which pictures of any size are opened, decoded and cut."""


def register_formats(path: Path) -> None:
    """Let Pillow know a format that another package reads, if a file is of it and the package is there."""
    if path.suffix == ".jxl":
        with suppress(ImportError):
            import pillow_jxl  # noqa: F401


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """A picture of any size.

    Raises:
        OSError: It cannot be read.
    """
    register_formats(path)
    with without_pillows_limit(), Image.open(path) as picture:
        yield picture


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
