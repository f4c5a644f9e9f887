"""Pictures as files that carry their own provenance: written band by band, and read back."""

from scale_dit.picture_files.bands import NotFiniteError, quantise, to_float, to_uint8
from scale_dit.picture_files.formats import FORMATS, PictureFormat, picture_format
from scale_dit.picture_files.provenance import fingerprint, read_provenance, save_picture, write_picture
from scale_dit.picture_files.reading import (
    load_picture,
    opened,
    picture_bits,
    register_formats,
    without_pillows_limit,
)

__all__ = [
    "FORMATS",
    "NotFiniteError",
    "PictureFormat",
    "fingerprint",
    "load_picture",
    "opened",
    "picture_bits",
    "picture_format",
    "quantise",
    "read_provenance",
    "register_formats",
    "save_picture",
    "to_float",
    "to_uint8",
    "without_pillows_limit",
    "write_picture",
]
