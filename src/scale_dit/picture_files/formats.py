"""The formats in which pictures can be written."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import BinaryIO

from scale_dit.errors import UserError
from scale_dit.picture_files.bands import Band, Metadata
from scale_dit.picture_files.compact import jxl_missing, write_jxl, write_webp
from scale_dit.picture_files.png import LONGEST_TEXT, write_png
from scale_dit.picture_files.tiff import write_tiff


@dataclass(frozen=True)
class PictureFormat:
    """One format.

    Args:
        suffix: Of its files.
        bits: A value.
        write: Writes bands of a picture: `(file, bands, height, width, bits, metadata, quality)`; metadata is called
            after the last band and gives ASCII or `None`, quality is as in `check`.
        longest: Side in px of the largest picture.
        longest_metadata: Bytes of text that readers take.
        missing: Why it cannot be written here, if so.
        lossy: Whether it has a quality.
    """

    suffix: str
    bits: int
    write: Callable[[BinaryIO, Iterable[Band], int, int, int, Metadata, int | None], None]
    longest: int = 2**31 - 1
    longest_metadata: int = 2**31 - 1
    missing: Callable[[], str | None] = lambda: None
    lossy: bool = False

    def check(self, quality: int | None) -> None:
        """Refuse what cannot be written.

        Args:
            quality: Of formats that lose something, from 1 to 100; `None` loses nothing.

        Raises:
            UserError: A package is missing, or a quality that cannot be.
        """
        if reason := self.missing():
            raise UserError(reason)
        if quality is None:
            return
        if not self.lossy:
            raise UserError(f"quality is {quality}, but {self.suffix} files lose nothing: leave it out (quality=null)")
        if not 1 <= quality <= 100:
            raise UserError(f"quality is {quality}, but it must be from 1 to 100, or null, which loses nothing")

    def check_size(self, height: int, width: int) -> None:
        """Refuse a picture that is too large for the format; sides in px.

        Raises:
            UserError: With the formats that take it.
        """
        if max(height, width) > self.longest:
            raise UserError(
                f"{self.suffix} files have at most {self.longest} px a side, but the picture has {height} x {width}: "
                f"use format=png, png16, tiff, tiff16 or jxl"
            )


FORMATS = {
    "png": PictureFormat(".png", 8, write_png, longest_metadata=LONGEST_TEXT),
    "png16": PictureFormat(".png", 16, write_png, longest_metadata=LONGEST_TEXT),
    "tiff": PictureFormat(".tiff", 8, write_tiff),
    "tiff16": PictureFormat(".tiff", 16, write_tiff),
    "webp": PictureFormat(".webp", 8, write_webp, longest=16383, lossy=True),
    "jxl": PictureFormat(".jxl", 8, write_jxl, missing=jxl_missing, lossy=True),
}


def picture_format(name: str) -> PictureFormat:
    """A format by its name.

    Raises:
        UserError: There is none of that name.
    """
    if name not in FORMATS:
        raise UserError(f"unknown format {name!r}: use one of {', '.join(FORMATS)}")
    return FORMATS[name]
