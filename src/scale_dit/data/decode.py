"""From a picture file to an RGB tensor: orientation, transparency, colour spaces and bit depths in one place.

Whatever the file holds, the result is `[3, H, W]`, float32, sRGB, in [0, 1], upright:

* EXIF orientation is applied;
* transparency is composited over white, the ground on which most such pictures were drawn;
* an embedded colour profile (Display P3, Adobe RGB, a printer's CMYK) is converted to sRGB;
* 16-bit greyscale is divided by 65535 (Pillow's own conversion would clip everything above 255 to white);
* of an animation the first frame is taken.

Pictures have at most `LARGEST` pixels: more than Pillow takes, since those of this project have.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

from scale_dit.picture_files import register_formats, without_pillows_limit

log = logging.getLogger(__name__)

Box = tuple[float, float, float, float]

LARGEST = 2**29
"""Pixels: twice those of 16384 x 16384; decoded, 6 GiB in float32."""

_ORIENTATION = 0x0112
_DEEP_GREY = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")
# Formats whose 32-bit integer mode is Pillow's stand-in for 16-bit samples.
_SIXTEEN_BIT_FORMATS = ("PNG", "PPM")


class PictureError(Exception):
    """A picture that cannot be used; the message says why. The caller knows its name and decides what to do.

    Attributes:
        remedy: What to do about it.
    """

    remedy = "give a picture file such as PNG, JPEG, TIFF or WebP"


class TooLargeError(PictureError):
    """A picture of more than `LARGEST` pixels."""

    remedy = "reduce or crop it"


@contextmanager
def reading() -> Iterator[None]:
    """What is read with Pillow inside may be larger than its own limit.

    Raises:
        PictureError: Whatever Pillow raises.
    """
    try:
        with without_pillows_limit():
            yield
    except PictureError:
        raise
    except Exception as error:  # Pillow's readers raise many types on damaged files
        raise PictureError(_reason(error)) from error


def open_picture(data: bytes | str | Path) -> Image.Image:
    """Open a picture from its bytes or path. Pixels are not decoded yet.

    Raises:
        PictureError: missing, empty, in no format that Pillow knows, or of more than `LARGEST` pixels.
    """
    with reading():
        if not isinstance(data, bytes):
            register_formats(Path(data))
        image = Image.open(io.BytesIO(data) if isinstance(data, bytes) else data)
        if image.width * image.height > LARGEST:
            image.close()
            raise TooLargeError(
                f"it has {image.width} x {image.height} px, {image.width * image.height:,} in all, and {LARGEST:,} "
                f"are the most that is read"
            )
        return image


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) in pixels after EXIF orientation.

    Raises:
        PictureError: damaged; for a PNG Pillow decodes the whole file, since EXIF may follow the pixels.
    """
    with reading():
        turned = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
    width, height = image.size
    return (width, height) if turned else (height, width)


def verify(image: Image.Image) -> None:
    """Read the whole compressed stream, as cheaply as the format allows (JPEG: decoded at an eighth).

    Raises:
        PictureError: truncated or damaged data, or pixels without a defined white.
    """
    with reading():
        _white_level(image)
        image.draft(image.mode, (1, 1))
        image.load()


def to_rgb(image: Image.Image, box: Box | None = None, size: tuple[int, int] | None = None) -> Tensor:
    """Decode a picture of any mode.

    Args:
        image: from `open_picture`.
        box: (left, top, right, bottom) to cut out, in pixels of the upright picture, fractions allowed. Default: all.
        size: (height, width) to resize the cut to (bicubic, antialiased). Default: the whole pixels of the cut.

    Returns:
        `[3, H, W]`, float32, sRGB in [0, 1].

    Raises:
        PictureError: damaged data or a mode without a defined conversion.
    """
    with reading():
        flat = _without_alpha(ImageOps.exif_transpose(image), _white_level(image))
        flat = _cut(flat, box, size)
        if flat.mode == "F":
            grey = torch.from_numpy(np.array(flat, dtype=np.float32)).clamp_(0, 1)
            return grey.expand(3, -1, -1).contiguous()
        rgb = _to_srgb(flat, image.info.get("icc_profile"))
        return torch.from_numpy(np.array(rgb, dtype=np.uint8)).permute(2, 0, 1).float().div_(255)


def _white_level(image: Image.Image) -> float | None:
    """The value of white in a deep greyscale mode; None for 8-bit modes."""
    if image.mode not in _DEEP_GREY:
        return None
    if image.mode.startswith("I;16"):
        return 65535.0
    if image.mode == "I" and image.format in _SIXTEEN_BIT_FORMATS:
        return 65535.0
    if image.mode == "F":
        low, high = np.asarray(image).min(), np.asarray(image).max()
        if low >= 0 and high <= 1:
            return 1.0
        raise PictureError(f"floating-point samples from {low:g} to {high:g}, expected 0 to 1")
    raise PictureError("32-bit integer samples have no defined white; save it as 8 or 16 bits")


def _without_alpha(image: Image.Image, white: float | None) -> Image.Image:
    """One of the modes F (deep grey in [0, 1]), L, RGB, CMYK, ..., but never a palette and never transparent."""
    if white is not None:
        return Image.fromarray(np.asarray(image).astype(np.float32) / np.float32(white))
    if image.has_transparency_data:
        layered = image.convert("RGBA")
        ground = Image.new("RGBA", layered.size, "white")
        return Image.alpha_composite(ground, layered).convert("RGB")
    if image.mode in ("1", "P"):
        return image.convert("RGB")
    return image


def _cut(image: Image.Image, box: Box | None, size: tuple[int, int] | None) -> Image.Image:
    if size is not None:
        height, width = size
        return image.resize((width, height), Image.Resampling.BICUBIC, box=box)
    if box is not None:
        left, top, right, bottom = (round(edge) for edge in box)
        return image.crop((left, top, right, bottom))
    return image


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
            if converted is not None:
                return converted
        except (ImageCms.PyCMSError, OSError) as error:
            # A profile for another mode than the pixels' is common in files that passed through old editors.
            log.debug("embedded colour profile not used: %s", error)
    if image.mode == "LAB":
        raise PictureError("Lab picture without a usable colour profile; save it as RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    text = " ".join(str(error).split())
    if text.startswith("cannot identify image file"):
        return "not a picture in any known format"
    return text or type(error).__name__
