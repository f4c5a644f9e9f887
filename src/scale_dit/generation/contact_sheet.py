"""Drafts beside each other, numbered, to choose from, and whether what is refined was chosen from them."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from textwrap import shorten
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from scale_dit.errors import UserError
from scale_dit.files import write_atomically
from scale_dit.generation.disk import writing
from scale_dit.generation.folder import SHEET, SHEET_LIST, OutputFolder
from scale_dit.generation.pictures import Picture
from scale_dit.picture_files import opened

SIDE, MARGIN, LINE, FONT_SIZE = 256, 8, 20, 15
MOST_COLUMNS = 8
LONGEST_PROMPT = 80
"""Characters of a prompt in a message."""


def write_contact_sheet(folder: OutputFolder, pictures: Sequence[Picture]) -> Path:
    """Draw the previews of drafts that are there, each over its number, seed and prompt, and list them as JSON.

    Returns:
        The sheet.

    Raises:
        UserError: It cannot be written.
    """
    drafted = [picture for picture in pictures if folder.draft_file(picture).is_file()]
    columns = min(MOST_COLUMNS, max(1, round(len(drafted) ** 0.5)))
    rows = -(-len(drafted) // columns)
    cell = (SIDE + MARGIN, SIDE + LINE + MARGIN)
    sheet = Image.new("RGB", (columns * cell[0] + MARGIN, rows * cell[1] + MARGIN), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    for place, picture in enumerate(drafted):
        left, top = MARGIN + place % columns * cell[0], MARGIN + place // columns * cell[1]
        with opened(folder.draft_file(picture)) as draft:
            preview = draft.convert("RGB")
            preview.thumbnail((SIDE, SIDE))
            sheet.paste(preview, (left, top + SIDE - preview.height))
        label = f"{picture.index}  seed {picture.seed}  {picture.prompt}"
        pen.text((left, top + SIDE + 1), _cut(label, font), fill="black", font=font)
    content = io.BytesIO()
    sheet.save(content, format="PNG")
    listed = [asdict(picture) | {"draft": _draft_name(folder, picture)} for picture in drafted]
    with writing(folder):
        write_atomically(folder.path / SHEET, content.getbuffer())
        write_atomically(folder.path / SHEET_LIST, json.dumps(listed, indent=1, ensure_ascii=False) + "\n")
    return folder.path / SHEET


def check_against_sheet(folder: OutputFolder, pictures: Sequence[Picture]) -> None:
    """Refuse pictures whose numbers are those of other drafts on the folder's contact sheet, if it has one.

    Raises:
        UserError: With what the sheet shows; or its list cannot be read.
    """
    shown = _listed(folder)
    for picture in pictures:
        entry = shown.get(picture.index)
        if entry is not None and entry.draft != _draft_name(folder, picture):
            raise UserError(
                f"picture {picture.index} on {folder.path / SHEET} has seed {entry.seed} and prompt "
                f"{shorten(entry.prompt, LONGEST_PROMPT)!r}, but this command asks for seed {picture.seed} and "
                f"prompt {shorten(picture.prompt, LONGEST_PROMPT)!r}. To refine what the sheet shows, leave out what "
                "changes its numbers (seed=, n=, prompts); for new drafts give stage=draft first, or another folder "
                "(output=...)"
            )


class _Shown(NamedTuple):
    """What is under a number."""

    draft: str
    seed: int
    prompt: str


def _listed(folder: OutputFolder) -> dict[int, _Shown]:
    """What the contact sheet shows, by number; nothing if there is none."""
    path = folder.path / SHEET_LIST
    if not path.is_file():
        return {}
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
        return {each["index"]: _Shown(each["draft"], each["seed"], each["prompt"]) for each in listed}
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} cannot be read ({error}): remove it, or give stage=draft to write it anew") from error


def _draft_name(folder: OutputFolder, picture: Picture) -> str:
    """Where a draft's preview lies in the folder."""
    return str(folder.draft_file(picture).relative_to(folder.path))


def _cut(label: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """As much of a label as fits under a draft."""
    label = " ".join(label.split())
    while label and font.getlength(label) > SIDE:
        label = label[:-1]
    return label
