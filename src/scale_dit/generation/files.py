"""How the files of a run are written, and whether a file that is there was written so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scale_dit.autoencoder import Decoding
from scale_dit.errors import UserError
from scale_dit.generation.numbers import check_number
from scale_dit.picture_files import PictureFormat, picture_format

TILED = "tiled"
"""The decode mode that is not exact."""


@dataclass(frozen=True)
class Files:
    """How pictures and latents are written.

    Args:
        format: One of `scale_dit.picture_files.FORMATS`.
        quality: See `PictureFormat.check`.
        save_every: Latents of a draft or a picture in the making are saved after so many steps.
        keep_latents: Whether latents stay when their picture is there, to be decoded again.

    Raises:
        UserError: An unknown format, one that cannot be written here, a quality that cannot be, or less than one step.
    """

    format: str = "png"
    quality: int | None = None
    save_every: int = 5
    keep_latents: bool = False

    def __post_init__(self) -> None:
        check_number("quality", self.quality, whole=True)
        check_number("save_every", self.save_every, whole=True)
        self.kind.check(self.quality)
        if self.save_every < 1:
            raise UserError(f"save_every is {self.save_every}, but it must be at least 1 step")

    @property
    def kind(self) -> PictureFormat:
        """The format."""
        return picture_format(self.format)

    def record(self, decoding: Decoding) -> dict[str, Any]:
        """What a picture's metadata say of its file, beside what it shows: plain values.

        Args:
            decoding: How it was decoded, `auto` resolved.
        """
        tile = {"decode_tile": decoding.tile} if decoding.mode == TILED else {}
        return {"format": self.format, "quality": self.quality, "decode": decoding.mode, **tile}

    def made(self, provenance: Mapping[str, Any], asked: Decoding) -> bool:
        """Whether a file was written in this way, and decoded at least as exactly as is asked for.

        Args:
            provenance: Of the file, with what `record` gave.
            asked: `auto` asks for nothing. Tiles ask for little memory: they do not replace what was decoded exactly.
        """
        if (provenance.get("format"), provenance.get("quality")) != (self.format, self.quality):
            return False
        if provenance.get("decode") != TILED or asked.mode == "auto":
            return True
        return asked.mode == TILED and provenance.get("decode_tile") == asked.tile

    def options(self, asked: Decoding) -> tuple[str, ...]:
        """The options that ask for such files on the command line."""
        quality = (f"quality={'null' if self.quality is None else self.quality}",) if self.kind.lossy else ()
        decode = () if asked.mode == "auto" else (f"memory.decode={asked.mode}",)
        tile = (f"decode_tile={asked.tile}",) if asked.mode == TILED else ()
        return (f"format={self.format}", *quality, *decode, *tile)
