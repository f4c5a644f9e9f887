"""Messages to the person at the keyboard."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text


def print_error(error: BaseException | str) -> None:
    """One error, without a traceback, on standard error; brackets in it are no markup."""
    Console(stderr=True).print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)


def print_note(note: str) -> None:
    """A note on standard error."""
    Console(stderr=True).print(Text(note), soft_wrap=True)
