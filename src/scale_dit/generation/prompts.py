"""Prompts: from the command line, whatever their text, and from files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from scale_dit.errors import UserError
from scale_dit.generation.window_prompts import read_window_prompts
from scale_dit.local_control import WindowPrompt

FILE_KINDS = (".txt", ".jsonl", ".csv")
LARGEST_SEED = 2**63 - 1

FIELDS = ("prompt", "seed", "height", "width", "negative_prompt", "window_prompts", "file", "seconds")
"""What a line may hold; the last two stand in a list of finished pictures, which is a prompt file again."""


@dataclass(frozen=True)
class Prompt:
    """One prompt and what its line of a file says about it; `None`: as for all the others.

    Args:
        text: The prompt.
        seed: Its first seed.
        height, width: In px.
        negative_prompt: For classifier-free guidance.
        window_prompts: What windows show instead.
        source: Where it stands, for messages, such as `prompts.csv, line 3`.
    """

    text: str
    seed: int | None = None
    height: int | None = None
    width: int | None = None
    negative_prompt: str | None = None
    window_prompts: tuple[WindowPrompt, ...] | None = None
    source: str = "the command line"


@dataclass
class PromptFile:
    """What a file holds: its prompts, and what is wrong with the lines that were left out."""

    prompts: list[Prompt] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    unknown_fields: list[str] = field(default_factory=list)


def read_prompts(path: str | Path) -> PromptFile:
    """Read a file of prompts: `.txt` (one a line), `.jsonl` (strings or objects) or `.csv` (with a header).

    In `.txt`, lines that begin with `#` are comments. Objects and columns: `prompt`, and optionally `seed`, `height`,
    `width`, `negative_prompt`, `window_prompts`. A line that cannot be used is named in `broken`, and the rest is read.

    Raises:
        UserError: The file cannot be read, is of another kind, or holds no prompt that can be used.
    """
    path = Path(path)
    if path.suffix.lower() not in FILE_KINDS:
        raise UserError(f"prompt file {path} is none of {', '.join(FILE_KINDS)}: rename it or convert it")
    try:
        # Bytes that are no UTF-8 become lone surrogates, so that only their own line is lost.
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise UserError(f"prompt file {path} cannot be read: {error.strerror}") from error
    reader = {".txt": _text_lines, ".jsonl": _json_lines, ".csv": _csv_lines}[path.suffix.lower()]
    found = PromptFile()
    for line, entry in reader(path, text):
        source = f"{path.name}, line {line}"
        try:
            found.prompts.append(_prompt(entry, source))
        except UserError as error:
            found.broken.append(f"{source}: {error}")
        if isinstance(entry, Mapping):
            found.unknown_fields += [key for key in entry if key not in (*FIELDS, *found.unknown_fields)]
    if not found.prompts:
        what = "it is empty, or has comments (#) only"
        if found.broken:
            what = f"no line of it can be used: {'; '.join(found.broken[:3])}"
        raise UserError(f"prompt file {path} holds no prompt: {what}")
    return found


Entry = Mapping[str, Any] | str | UserError


def _text_lines(path: Path, text: str) -> Iterator[tuple[int, Entry]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield number, line.strip()


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, Entry]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:  # the latter of brackets in brackets
            entry = UserError(f"no JSON ({error})")
        if not isinstance(entry, Mapping | str | UserError):
            entry = UserError("neither a string nor an object with a prompt")
        yield number, entry


def _csv_lines(path: Path, text: str) -> Iterator[tuple[int, Entry]]:
    lines = io.StringIO(text, newline="").readlines()
    first = csv.reader(lines, strict=True, skipinitialspace=True)
    try:
        columns = [column.strip() for column in next(first, [])]
    except csv.Error as error:
        raise UserError(f"the first line of prompt file {path} cannot be read: {error}") from error
    if "prompt" not in columns:
        raise UserError(
            f"prompt file {path} has no column 'prompt': its first line must name the columns, such as "
            f"prompt,seed,height,width,negative_prompt; it names {', '.join(columns) or 'none'}"
        )
    for line, row in _csv_rows(lines, first.line_num):
        if isinstance(row, UserError):
            yield line, row
        elif len(row) > len(columns):
            yield line, UserError("more fields than columns: put a prompt that holds a comma into quotation marks")
        else:
            fields = zip_longest(columns, row)
            yield line, {key: value for key, value in fields if value not in (None, "") or key == "prompt"}


def _csv_rows(lines: Sequence[str], begin: int) -> Iterator[tuple[int, list[str] | UserError]]:
    """The rows after the first `begin` lines, each with the number of its first line.

    An open quotation mark swallows the lines behind it; once it is seen to be one, they are read anew.
    """
    while begin < len(lines):
        reader = csv.reader(lines[begin:], strict=True, skipinitialspace=True)
        read = 0
        try:
            for row in reader:
                if row:
                    yield begin + read + 1, row
                read = reader.line_num
            return
        except csv.Error as error:
            yield begin + read + 1, UserError(f"no CSV ({error}): is a quotation mark not closed?")
            begin += read + 1


def _prompt(entry: Entry, source: str) -> Prompt:
    """A line's prompt.

    Raises:
        UserError: What is wrong with it.
    """
    if isinstance(entry, UserError):
        raise entry
    if isinstance(entry, str):
        return Prompt(_text(entry, "prompt"), source=source)
    if "prompt" not in entry:
        raise UserError("no 'prompt'")
    negative, windows = entry.get("negative_prompt"), entry.get("window_prompts")
    return Prompt(
        _text(entry["prompt"], "prompt"),
        seed=_whole_number(entry.get("seed"), "seed", LARGEST_SEED),
        height=_whole_number(entry.get("height"), "height"),
        width=_whole_number(entry.get("width"), "width"),
        negative_prompt=None if negative is None else _text(negative, "negative_prompt", empty=True),
        window_prompts=None if windows is None else read_window_prompts(windows),
        source=source,
    )


def _text(value: Any, name: str, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise UserError(f"{name} is {value!r}, which is no text")
    if not empty and not value.strip():
        raise UserError(f"{name} is empty")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise UserError(f"{name} is not UTF-8")
    return value


def _whole_number(value: Any, name: str, highest: int = 10**6) -> int | None:
    if value is None:
        return None
    try:
        number = int(value)
        if isinstance(value, bool) or (isinstance(value, float) and value != number):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{name} is {value!r}, which is no whole number") from None
    if not 0 <= number <= highest:
        raise UserError(f"{name} is {number}, but it must be from 0 to {highest}")
    return number
