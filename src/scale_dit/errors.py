"""Errors that are meant for the person at the keyboard."""

from __future__ import annotations

from pathlib import Path


class UserError(ValueError):
    """A mistake in what the user asked for.

    The message names the value, what is allowed, and the remedy. Entry points print it without a traceback and exit
    with status 2.
    """


class Interrupted(Exception):  # noqa: N818 - no error: what the user asked for
    """Training stopped on request, after its state was saved."""

    def __init__(self, step: int, checkpoint: Path):
        super().__init__(f"interrupted after step {step}; the state is in {checkpoint}")
        self.step, self.checkpoint = step, checkpoint
