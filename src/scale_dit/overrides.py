"""Hydra's overrides as people type them: texts quoted, paths made absolute."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from scale_dit.errors import UserError

TEXT_OPTIONS = ("prompt", "negative_prompt", "prompts_file", "window_prompts", "draft", "remake", "mask", "resume")
"""Options whose value is any text, not Hydra's override grammar."""

FILES = ("prompts_file", "draft", "remake", "mask", "resume", "output", "hydra.run.dir", "ckpt_path")
"""Options that are always files or folders of the user's."""

PATH_OPTION = re.compile(r"(.+\.)?(\w*(path|file|folder|dir)|initial|initial_lora|vae|cache|export|tiny_base)")
"""Options that may be paths, but also ids of models or `none`."""


def quote_text_options(arguments: Sequence[str], options: Sequence[str] = TEXT_OPTIONS) -> list[str]:
    """Command-line arguments in which the value of every text option is quoted for Hydra.

    Hydra's grammar gives commas, quotes, equal signs, brackets, parentheses and `${` a meaning of their own. Here
    `prompt=<text>` means that text, to the letter. An option that is given several times makes a list, and so does a
    JSON list of strings.

    >>> quote_text_options(["base=tiny", "prompt=a (red) circle, a=b"])
    ['base=tiny', "prompt='a (red) circle, a=b'"]
    """
    pattern = re.compile(rf"(?P<name>\+{{0,2}}(?:{'|'.join(map(re.escape, options))}))=(?P<text>.*)", re.DOTALL)
    quoted: list[str] = []
    texts: dict[str, list[str]] = {}
    places: dict[str, int] = {}
    for argument in arguments:
        match = pattern.fullmatch(argument)
        if match is None:
            quoted.append(argument)
            continue
        name = match["name"]
        texts.setdefault(name, []).extend(_string_list(match["text"]) or [match["text"]])
        places.setdefault(name, len(quoted))
        if places[name] == len(quoted):
            quoted.append("")
        several = len(texts[name]) > 1 or _string_list(match["text"]) is not None
        items = ",".join(map(quote, texts[name]))
        quoted[places[name]] = f"{name}=[{items}]" if several else f"{name}={items}"
    return quoted


def _string_list(text: str) -> list[str] | None:
    """A JSON list of strings, or `None` if the text is anything else."""
    if not text.startswith("["):
        return None
    try:
        items = json.loads(text)
    except ValueError:
        return None
    return items if items and all(isinstance(item, str) for item in items) else None


def quote(text: str) -> str:
    """A quoted string of Hydra's grammar that comes out of OmegaConf as `text`."""
    # OmegaConf unescapes backslashes before an interpolation, Hydra those before a quotation mark or the end.
    text = re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", text)
    text = re.sub(r"(\\*)'", lambda match: match[1] * 2 + r"\'", text)
    text = re.sub(r"(\\+)\Z", lambda match: match[1] * 2, text)
    return f"'{text}'"


def check_pick(arguments: Sequence[str]) -> list[str]:
    """The arguments, unless `pick=3,7` is among them, which Hydra would take for a sweep.

    Raises:
        UserError: With the list that was meant.
    """
    sweep = {"--multirun", "-m"} & set(arguments)
    wrong = [argument for argument in arguments if re.fullmatch(r"pick=[\d ]+(,[\d ]*)+", argument)]
    if wrong and not sweep:
        listed = ",".join(re.findall(r"\d+", wrong[0]))
        raise UserError(f"{wrong[0]} is no list, which has brackets: use 'pick=[{listed}]'")
    return list(arguments)


def is_override(argument: str) -> bool:
    """Whether a command-line argument is an override and no flag."""
    return not argument.startswith("-") and ("=" in argument or argument.startswith("~"))


def key_of(override: str) -> str:
    """The option that an override is about."""
    return override.split("=", 1)[0].lstrip("+~")


def path_argument(arguments: Sequence[str], option: str) -> Path | None:
    """The path that `<option>=<path>` names among command-line arguments.

    Raises:
        UserError: It is a list, or Hydra cannot read it.
    """
    given = [argument for argument in arguments if is_override(argument) and key_of(argument) == option]
    if not given:
        return None
    try:
        path = OverridesParser.create().parse_override(given[-1]).value()
    except HydraException as error:
        raise UserError(f"{given[-1]} cannot be read ({error}): quote the path, as in '{option}=\"a path\"'") from error
    if not isinstance(path, str):
        raise UserError(f"{option} is given more than once: it takes one path")
    return Path(path)


def seen_from(directory: Path, override: str) -> str:
    """An override as it was typed in `directory`, with its relative paths made absolute.

    Of values that may be something else than a path, those that name a file or folder in `directory`.
    """
    if not is_override(override) or override.startswith("~"):
        return override
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException:  # Hydra will say so
        return override
    if parsed.is_sweep_override():
        return override
    value = parsed.value()
    absolute = _absolute(key_of(override), value, directory)
    return override if absolute == value else f"{override.split('=', 1)[0]}={_written(absolute)}"


def _absolute(option: str, value: Any, directory: Path) -> Any:
    if isinstance(value, list):
        return [_absolute(option, each, directory) for each in value]
    if isinstance(value, dict):
        return {key: _absolute(str(key), each, directory) for key, each in value.items()}
    if not isinstance(value, str) or not value or "${" in value:
        return value
    exists = PATH_OPTION.fullmatch(option) is not None and (directory / value).exists()
    return str(directory / value) if exists or option in FILES else value


def _written(value: Any) -> str:
    """A value in Hydra's grammar."""
    if isinstance(value, list):
        return f"[{','.join(map(_written, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}: {_written(each)}' for key, each in value.items())}}}"
    if isinstance(value, str):
        return quote(value)
    return "null" if value is None else str(value)
