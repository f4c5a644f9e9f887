"""What a picture was made with, inside its file; beside it where the format cannot hold it."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import tifffile
from torch import Tensor

from scale_dit.files import atomic_file, write_atomically
from scale_dit.picture_files.bands import quantise
from scale_dit.picture_files.compact import DESCRIPTION
from scale_dit.picture_files.formats import FORMATS, PictureFormat
from scale_dit.picture_files.png import KEYWORD
from scale_dit.picture_files.reading import opened
from scale_dit.picture_files.tiff import tiff_description

log = logging.getLogger(__name__)

Provenance = Mapping[str, Any] | Callable[[], Mapping[str, Any]]

SUFFIX_BESIDE = ".json"
UNREADABLE = (OSError, SyntaxError, RuntimeError, tifffile.TiffFileError)
"""What readers raise on damaged files: SyntaxError is Pillow's on broken PNG chunks, RuntimeError that of JPEG XL."""


def write_picture(
    path: Path,
    bands: Iterable[Tensor],
    height: int,
    width: int,
    provenance: Provenance | None = None,
    how: PictureFormat = FORMATS["png"],
    quality: int | None = None,
) -> None:
    """Write a picture atomically, with `provenance` as JSON in its metadata.

    Metadata that the format cannot hold goes into a file beside the picture, of the same name and `.json`, and a
    warning says so.

    Args:
        bands: The picture in bands `[3, rows, W]`, float in [0, 1] or uint8, from the top.
        height, width: In px.
        provenance: Plain values, or what gives them when all bands are there.
        quality: See `PictureFormat.check`.

    Raises:
        OSError: As the file system says.
        ValueError: A value of the picture is not finite.
    """
    too_long: list[str] = []

    def metadata() -> str | None:
        if provenance is None:
            return None
        text = json.dumps(dict(provenance() if callable(provenance) else provenance), default=str)
        if len(text) <= how.longest_metadata:
            return text
        too_long.append(text)
        return None

    with atomic_file(path) as file:
        how.write(file, quantise(bands, how.bits), height, width, how.bits, metadata, quality)
    beside = path.with_suffix(SUFFIX_BESIDE)
    if not too_long:
        beside.unlink(missing_ok=True)
        return
    log.warning(
        "%s: %d bytes of metadata cannot be written into a %s file, which holds %d: they are in %s",
        path, len(too_long[0]), how.suffix, how.longest_metadata, beside,
    )  # fmt: skip
    write_atomically(beside, too_long[0])


def save_picture(image: Tensor, path: Path, provenance: Mapping[str, Any] | None = None) -> None:
    """Write one picture `[3, H, W]` as PNG, atomically, with `provenance` as JSON in a text chunk."""
    height, width = image.shape[-2:]
    write_picture(path, [image], height, width, provenance)


def read_provenance(path: Path) -> dict[str, Any] | None:
    """The provenance that `write_picture` wrote; `None` if the file is missing, damaged or somebody else's."""
    try:
        text = tiff_description(path) if path.suffix == ".tiff" else _text(path)
        beside = path.with_suffix(SUFFIX_BESIDE)
        if text is None and path.suffix != beside.suffix and path.is_file() and beside.is_file():
            text = beside.read_text()
    except UNREADABLE:
        return None
    try:
        found = json.loads(text) if text else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def fingerprint(settings: Mapping[str, Any], prompt: str, seed: int) -> str:
    """Digest of everything that decides what a picture looks like; settings must be plain values."""
    text = json.dumps([dict(settings), prompt, seed], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _text(path: Path) -> str | None:
    """The text in a file that Pillow reads, after all its pixels were read."""
    with opened(path) as picture:
        picture.load()
        if picture.format == "PNG":
            return getattr(picture, "text", {}).get(KEYWORD)
        return picture.getexif().get(DESCRIPTION)
