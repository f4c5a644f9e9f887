"""Several processes on one folder: each picture is made by one of them."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from scale_dit.errors import UserError

FILE = "claims.lock"
CLEARING = 2**40
"""The byte that is locked while a folder is cleared: behind those of all pictures."""
LONGEST_JOB = 256


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
        self.file = _open(folder)
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
            raise _no_locks(self.folder, error) from error
        return True

    def release(self, index: int) -> None:
        """Give a claim back."""
        fcntl.lockf(self.file, fcntl.LOCK_UN, 1, index)


def clear_once(folder: Path, job: str, is_over: Callable[[], bool], clear: Callable[[], None]) -> None:
    """Clear a folder for a job, unless another process did so for the same job and it is not over.

    The lock file holds the name of the job for which it was cleared last.

    Args:
        folder: It must exist.
        job: Names it, the same in all its processes; ASCII.

    Raises:
        UserError: The file system has no locks.
    """
    file = _open(folder)
    try:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX, 1, CLEARING)
        except OSError as error:
            raise _no_locks(folder, error) from error
        if os.pread(file, LONGEST_JOB, 0) == job.encode() and not is_over():
            return
        clear()
        os.ftruncate(file, 0)
        os.pwrite(file, job.encode(), 0)
    finally:
        os.close(file)


def _open(folder: Path) -> int:
    return os.open(folder / FILE, os.O_RDWR | os.O_CREAT, 0o666)


def _no_locks(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"the file system of {folder} has no locks ({error.strerror}), with which several processes share a list of "
        f"prompts: use a local folder"
    )
