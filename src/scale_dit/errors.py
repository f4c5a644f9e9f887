"""Errors that are meant for the person at the keyboard."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in what the user asked for.

    The message names the value, what is allowed, and the remedy. Entry points print it without a traceback and exit
    with status 2.
    """
