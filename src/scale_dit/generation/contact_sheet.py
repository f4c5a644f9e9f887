"""Drafts beside each other, numbered, to choose from."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from scale_dit.files import write_atomically
from scale_dit.generation.disk import writing
from scale_dit.generation.folder import OutputFolder
from scale_dit.generation.pictures import Picture
from scale_dit.picture_files import opened

SHEET, LIST = "contact_sheet.png", "contact_sheet.json"
SIDE, MARGIN, LINE, FONT_SIZE = 256, 8, 20, 15
MOST_COLUMNS = 8


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
    listed = [
        asdict(picture) | {"draft": str(folder.draft_file(picture).relative_to(folder.path))} for picture in drafted
    ]
    with writing(folder):
        write_atomically(folder.path / SHEET, content.getbuffer())
        write_atomically(folder.path / LIST, json.dumps(listed, indent=1, ensure_ascii=False) + "\n")
    return folder.path / SHEET


def _cut(label: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """As much of a label as fits under a draft."""
    label = " ".join(label.split())
    while label and font.getlength(label) > SIDE:
        label = label[:-1]
    return label
