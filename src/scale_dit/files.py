"""Writing a file so that it is there whole or not at all, and naming what is in one."""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read in pieces.

    Raises:
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A new binary file beside the target that is renamed over it at the end; folders are made as needed.

    Raises:
        OSError: as the file system says (full, read-only, ...); nothing is left behind and an older file stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(partial, "wb+") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes | memoryview | str) -> None:
    """Write a file that is there whole or not at all; text becomes UTF-8.

    Raises:
        OSError: see `atomic_file`.
    """
    with atomic_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """A table as CSV with a header; `None` and missing values become empty cells.

    Raises:
        ValueError: a row has a column that is not in `columns`.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
