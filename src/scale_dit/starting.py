"""The seconds before a command does anything; imports nothing that takes time itself."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED_STATUS = 130


def is_first_process() -> bool:
    """Whether this is the process that the user started, and no further rank of it."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, Ctrl-C ends the process in one line, with status 130: there is nothing yet that could be saved.

    An exception would not do: libraries turn one that comes while they are imported into others.
    """
    before = signal.getsignal(signal.SIGINT)
    here = threading.current_thread() is threading.main_thread()
    if not here or before is not signal.default_int_handler:  # ignored, or somebody else's
        yield
        return
    signal.signal(signal.SIGINT, _stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _stop(number: int, frame: FrameType | None) -> None:
    if is_first_process():
        os.write(2, b"\nInterrupted. Start again with the same command.\n")
    os._exit(INTERRUPTED_STATUS)
