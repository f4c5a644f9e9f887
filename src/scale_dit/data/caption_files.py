"""Captions that lie beside pictures: `metadata.jsonl`, sidecar `.txt`, and the fields of a `.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scale_dit.errors import UserError

METADATA = "metadata.jsonl"
CAPTION_FIELDS = ("caption", "text", "prompt")


def read_metadata(path: Path, field: str | None = None) -> dict[str, str | None]:
    """Read a `metadata.jsonl` of the Hugging Face imagefolder layout.

    Args:
        path: of the file; one JSON object a line with `file_name` (relative to the file) and a caption.
        field: that holds the caption; default: the first of `caption`, `text`, `prompt` that is there.

    Returns:
        Caption by file name; None where the line has no caption.

    Raises:
        UserError: for a line that is not such an object, with its number.
    """
    captions: dict[str, str | None] = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        record = parse_json(line, place)
        name = record.get("file_name")
        if not isinstance(name, str) or not name:
            raise UserError(f"{place}: no 'file_name'; each line names its picture, relative to the file's folder")
        if name in captions:
            raise UserError(f"{place}: {name} is listed twice; keep one line for each picture")
        captions[name] = caption_of(record, place, field)
    return captions


def caption_of(record: Mapping[str, Any], place: str, field: str | None = None) -> str | None:
    """The caption in a record, None where it is missing or blank.

    Raises:
        UserError: if the caption is no string.
    """
    fields = CAPTION_FIELDS if field is None else (field,)
    for name in fields:
        value = record.get(name)
        if value is None:
            continue
        if not isinstance(value, str):
            raise UserError(
                f"{place}: {name!r} is {type(value).__name__}, expected a string; name another caption field"
            )
        return clean(value)
    return None


def clean(caption: str) -> str | None:
    """One line without surrounding space; None if nothing is left."""
    return " ".join(caption.split()) or None


def read_text(path: Path) -> str:
    """A text file as UTF-8, with or without a byte order mark.

    Raises:
        UserError: if it is in another encoding.
    """
    return decode_text(path.read_bytes(), str(path))


def decode_text(data: bytes, place: str) -> str:
    """As `read_text`, from bytes."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{place} is not UTF-8 (byte {error.start}); save it as UTF-8") from error


def parse_json(text: str, place: str) -> dict[str, Any]:
    """One JSON object.

    Raises:
        UserError: for anything else, with the place.
    """
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not valid JSON ({error.msg}, column {error.colno})") from error
    if not isinstance(record, dict):
        raise UserError(f"{place}: expected a JSON object, found {type(record).__name__}")
    return record
