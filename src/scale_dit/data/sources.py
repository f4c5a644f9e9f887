"""Photographs in a folder, in webdataset tars or in parquet files, as one table of Hugging Face `datasets`.

Folders and tars are indexed, not copied: a row holds where the bytes lie. (The `webdataset` builder of `datasets`
copies every byte into its own store, refuses a tar in which one caption is missing, and silently drops kinds of files
that the first five examples lack.) Parquet goes through `datasets` itself, which keeps a copy in its store.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scale_dit.data.decode import PictureError
from scale_dit.errors import UserError

log = logging.getLogger(__name__)

KINDS = ("folder", "webdataset", "parquet")
# Some of these need a plugin of Pillow; without it they are skipped by name, which is better than not being seen.
PICTURE_ENDINGS = frozenset(
    [
        ".avif",
        ".bmp",
        ".gif",
        ".heic",
        ".heif",
        ".jfif",
        ".jp2",
        ".jpe",
        ".jpeg",
        ".jpg",
        ".jxl",
        ".pgm",
        ".png",
        ".pnm",
        ".ppm",
        ".tga",
        ".tif",
        ".tiff",
        ".webp",
    ]
)


@dataclass(frozen=True)
class Skipped:
    """A picture that is not used, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass(frozen=True)
class PhotoSource:
    """A table of pictures with captions; bytes are read when asked for.

    Attributes:
        kind: one of `KINDS`.
        root: what was opened.
        table: a `datasets.Dataset`.
        files: that hold the bytes, for telling whether anything changed.
        names: one unique name a row, for messages and caches.
        captions: one a row.
        read: turns a row of the table into bytes, or a path.
        skipped: entries that could not even be listed, such as a picture that the captions name and nobody finds.
    """

    kind: str
    root: Path
    table: Any
    files: Sequence[Path]
    names: Sequence[str]
    captions: Sequence[str]
    read: Callable[[dict[str, Any]], bytes | Path]
    skipped: Sequence[Skipped] = field(default_factory=tuple)

    def __len__(self) -> int:
        return len(self.names)

    def data(self, index: int) -> bytes | Path:
        """Bytes or path of one picture.

        Raises:
            PictureError: if they cannot be read any more.
        """
        try:
            return self.read(self.table[index])
        except OSError as error:
            raise PictureError(f"cannot be read: {error.strerror or error}") from error

    def listing(self, with_times: bool = False) -> str:
        """Hash of names, captions and file sizes (and times of change): differs if any of these differ."""
        digest = hashlib.sha256()
        for name, caption in zip(self.names, self.captions, strict=True):
            digest.update(f"{name}\0{caption}\0".encode())
        for path in self.files:
            state = path.stat() if path.exists() else None
            digest.update(f"{path.name}\0{state.st_size if state else 'missing'}\0".encode())
            if with_times and state:
                digest.update(f"{state.st_mtime_ns}\0".encode())
        return digest.hexdigest()[:16]


def open_photos(
    path: str | Path,
    kind: str | None = None,
    caption_field: str | None = None,
    image_field: str | None = None,
    default_caption: str | None = None,
    store: str | Path | None = None,
) -> PhotoSource:
    """Open pictures with their captions.

    * A folder: every picture below it, captioned by `metadata.jsonl` (Hugging Face imagefolder: `file_name` and a
      caption, in any subfolder), else by a sidecar `name.txt`.
    * Webdataset: a `.tar` file or a folder of them; `key.jpg` with `key.txt`, else a caption field of `key.json`.
    * Parquet: a `.parquet` file or a folder of them, with a column of pictures (bytes, or `bytes` and `path`) and one
      of captions.

    Args:
        path: file or folder.
        kind: one of `KINDS`; default: told by what is there.
        caption_field: column or JSON field of captions; default: the first of `caption`, `text`, `prompt`.
        image_field: parquet column of pictures; default: the only one that holds pictures.
        default_caption: for pictures without a caption ("" for none); without it they are an error.
        store: folder for the copy that `datasets` keeps of parquet files; default: its own.

    Raises:
        UserError: nothing there, several kinds mixed, unknown kind or field, or pictures without captions.
    """
    from scale_dit.data.source_kinds import OPENERS

    root = Path(path).expanduser()
    if not root.exists():
        raise UserError(f"no pictures at {root}: there is no such file or folder; check the path")
    if kind is not None and kind not in KINDS:
        raise UserError(
            f"unknown kind of photo source {kind!r}; choose one of {', '.join(KINDS)}, or none to detect it"
        )
    kind = kind or detect_kind(root)
    source = OPENERS[kind](root, caption_field, image_field, default_caption, store)
    if len(source) == 0:
        raise UserError(f"no pictures in {root} (looked for {kind}){_listed(source.skipped)}")
    for skipped in source.skipped:
        log.warning("skipped %s", skipped)
    return source


def detect_kind(root: Path) -> str:
    """Tell `folder`, `webdataset` and `parquet` apart by file endings.

    Raises:
        UserError: if there is nothing, or more than one kind.
    """
    endings = {root.suffix.lower()} if root.is_file() else {file.suffix.lower() for file in visible_files(root)}
    found = []
    if endings & PICTURE_ENDINGS and root.is_dir():
        found.append("folder")
    if ".tar" in endings:
        found.append("webdataset")
    if ".parquet" in endings:
        found.append("parquet")
    if not found:
        raise UserError(
            f"no pictures in {root}: expected a folder of pictures ({' '.join(sorted(PICTURE_ENDINGS))}), "
            f"or .tar (webdataset) or .parquet files"
        )
    if len(found) > 1:
        raise UserError(f"{root} holds several kinds of photo source ({', '.join(found)}); say which with kind=")
    return found[0]


def visible_files(root: Path, ending: str | None = None) -> list[Path]:
    """Files below a folder (or the file itself), sorted, without hidden ones and macOS archives' leftovers."""
    if root.is_file():
        return [root]
    files = []
    for file in sorted(root.rglob("*")):
        parts = file.relative_to(root).parts
        hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
        if not hidden and file.is_file() and (ending is None or file.suffix.lower() == ending):
            files.append(file)
    return files


def complete_captions(
    names: Sequence[str], captions: Sequence[str | None], default: str | None, root: Path
) -> tuple[str, ...]:
    """Fill missing captions with the default.

    Raises:
        UserError: some are missing and there is no default; counts them and names the first.
    """
    missing = [name for name, caption in zip(names, captions, strict=True) if caption is None]
    if missing and default is None:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise UserError(
            f"{len(missing)} of {len(names)} pictures in {root} have no caption ({shown}); add them to metadata.jsonl "
            f'or a .txt of the same name, or set default_caption ("" trains them without text)'
        )
    return tuple(default if caption is None else caption for caption in captions)  # type: ignore[misc]


def _listed(skipped: Sequence[Skipped]) -> str:
    return "; skipped: " + "; ".join(map(str, skipped[:5])) if skipped else ""
