"""Several processes on one folder: each picture is made by one of them."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from scale_dit.errors import UserError

FILE = "claims.lock"


class Claims:
    """Which pictures this process makes: a lock on one byte of a file for each.

    The operating system takes the locks of a process that ended, however it ended, so no claim outlives its owner.
    They are POSIX record locks, which network file systems have too.

    Args:
        folder: That all the processes write into; it must exist.

    Raises:
        UserError: The file system has no locks.
    """

    def __init__(self, folder: Path):
        self.file = os.open(folder / FILE, os.O_RDWR | os.O_CREAT, 0o666)
        self.folder = folder

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self.file)

    def take(self, index: int) -> bool:
        """Claim a picture; `False` if another process has it."""
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, index)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise UserError(
                f"the file system of {self.folder} has no locks ({error.strerror}), with which several processes share "
                f"a list of prompts: use a local folder"
            ) from error
        return True

    def release(self, index: int) -> None:
        """Give a claim back."""
        fcntl.lockf(self.file, fcntl.LOCK_UN, 1, index)
