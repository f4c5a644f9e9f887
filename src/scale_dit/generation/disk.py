"""A disk that is too small, or cannot be written: said in one sentence, with how to go on."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from scale_dit.errors import UserError

if TYPE_CHECKING:
    from scale_dit.generation.folder import OutputFolder
    from scale_dit.generation.pictures import Picture


@contextmanager
def writing(folder: OutputFolder) -> Iterator[None]:
    """Turn what the operating system says about a file that cannot be written into one clear error.

    Raises:
        UserError: Naming the folder, the reason and how to go on.
    """
    try:
        yield
    except OSError as error:
        what = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise UserError(
            f"{folder.path} cannot be written: {what}. Finished pictures and saved steps are kept: once it can be "
            f"written, {folder.how_to_go_on}"
        ) from error


def check_space(folder: OutputFolder, pictures: Sequence[Picture], then: str) -> None:
    """Make the folder, and refuse a disk that cannot take the pictures if nothing of them compresses.

    Args:
        then: What to do with more space.

    Raises:
        UserError: Naming the space that is needed and that there is.
    """
    with writing(folder):
        folder.path.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.path).free
    needed = sum(3 * folder.files.kind.bits // 8 * picture.height * picture.width for picture in pictures)
    if needed > free:
        raise UserError(
            f"pictures, {len(pictures)} of them, can take {needed / 2**20:,.1f} MiB, but the disk of {folder.path} "
            f"has {free / 2**20:,.1f} MiB left: choose another folder (output=...), or free some space and {then}"
        )
