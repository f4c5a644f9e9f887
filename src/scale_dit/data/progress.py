"""Progress of long preparations: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

log = logging.getLogger(__name__)


@contextmanager
def shown_progress(what: str, line_seconds: float = 30.0) -> Iterator[Callable[[int, int], None]]:
    """Give a function to be called with what is done and all there is.

    Args:
        what: is being done, such as `Encoding photographs`.
        line_seconds: least seconds between two lines where there is no terminal.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(what, line_seconds)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class _Lines:
    def __init__(self, what: str, line_seconds: float):
        self.what, self.line_seconds = what, line_seconds
        self.written = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done >= total or now - self.written >= self.line_seconds:
            self.written = now
            log.info("%s: %d of %d", self.what, done, total)
