"""Prompts for windows, as they are written on the command line and in files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from scale_dit.errors import UserError
from scale_dit.local_control import WindowPrompt

FORM = '[{"box": [left, top, right, bottom], "prompt": "a blue star"}], the box in px'


def read_window_prompts(value: Any) -> tuple[WindowPrompt, ...]:
    """Prompts for windows from a list of mappings with `box` and `prompt`, from such a list as JSON or YAML, or from
    several of these.

    >>> read_window_prompts('[{"box": [0, 0, 512, 256], "prompt": "a star, blue"}]')
    (WindowPrompt(box=(0, 0, 512, 256), prompt='a star, blue'),)

    Raises:
        UserError: It is none of these.
    """
    if value is None:
        return ()
    if isinstance(value, str):
        try:
            found = yaml.safe_load(value)
            if isinstance(found, list | Mapping):
                return read_window_prompts(found)
            raise UserError(f"window_prompts {value!r} is no list: use {FORM}")
        except yaml.YAMLError as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"window_prompts {value!r} cannot be read ({reason}): use {FORM}") from error
    if isinstance(value, Mapping):
        return (_window_prompt(value),)
    if not isinstance(value, list | tuple):
        raise UserError(f"window_prompts is {value!r}: use {FORM}")
    return tuple(found for each in value for found in read_window_prompts(each))


def _window_prompt(value: Mapping[str, Any]) -> WindowPrompt:
    box, prompt = value.get("box"), value.get("prompt")
    if value.keys() != {"box", "prompt"} or not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f"window_prompts holds {dict(value)}, which is not a box and a prompt: use {FORM}")
    return WindowPrompt(read_box(box), prompt)


def read_box(value: Any) -> tuple[int, int, int, int]:
    """A box in px from a list of four whole numbers.

    Raises:
        UserError: It is none.
    """
    whole = isinstance(value, list | tuple) and all(isinstance(side, int) and side is not True for side in value)
    if not whole or len(value) != 4:
        raise UserError(f"the box {value!r} is not left, top, right, bottom in whole px, such as [0,0,512,256]")
    left, top, right, bottom = value
    return left, top, right, bottom
