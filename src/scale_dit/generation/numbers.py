"""Options that have to be numbers: Hydra takes any text for them."""

from __future__ import annotations

from typing import Any

from scale_dit.errors import UserError


def check_number(name: str, value: Any, whole: bool = False) -> None:
    """Refuse what is no number; `None` stands for a default.

    Raises:
        UserError: Naming the option and its value.
    """
    kinds = int if whole else (int, float)
    if value is not None and (isinstance(value, bool) or not isinstance(value, kinds)):
        raise UserError(f"{name} is {value!r}, which is no {'whole ' if whole else ''}number")
