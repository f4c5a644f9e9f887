"""One sheet that shows every arm side by side: a row for each prompt, a column for each arm."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap

from PIL import Image, ImageDraw, ImageFont

from scale_dit.errors import UserError
from scale_dit.files import write_atomically

MARGIN = 12
LINE = 20
FONT_SIZE = 15


def write_picture_grid(
    path: Path,
    rows: Sequence[Sequence[Path | None]],
    columns: Sequence[str],
    prompts: Sequence[str],
    side: int = 320,
    crop: bool = False,
) -> None:
    """Draw pictures with the arms' names above and each row's prompt below.

    Args:
        path: the PNG to write.
        rows: for each prompt the files of all arms; None leaves a gap.
        columns: names of the arms.
        prompts: text of each row.
        side: longer side of a cell in pixels.
        crop: show the middle of each picture at its own resolution instead of the whole picture reduced.

    Raises:
        UserError: the numbers of rows, columns and prompts do not fit together.
    """
    if len(rows) != len(prompts) or any(len(row) != len(columns) for row in rows):
        raise UserError("a picture grid needs one prompt per row and one file per column in each row")
    font = ImageFont.load_default(FONT_SIZE)
    width = MARGIN + len(columns) * (side + MARGIN)
    letters = max(20, int((width - 2 * MARGIN) / (FONT_SIZE * 0.52)))
    texts = [wrap(prompt, letters) or [""] for prompt in prompts]
    heights = [side + LINE * len(text) + MARGIN for text in texts]
    sheet = Image.new("RGB", (width, 2 * MARGIN + LINE + sum(heights)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, name in enumerate(columns):
        pen.text((MARGIN + column * (side + MARGIN), MARGIN), name, fill="black", font=font)
    top = 2 * MARGIN + LINE
    for row, text, height in zip(rows, texts, heights, strict=True):
        for column, file in enumerate(row):
            if file is not None:
                cell = _middle(file, side) if crop else _reduced(file, side)
                sheet.paste(cell, (MARGIN + column * (side + MARGIN), top + (side - cell.height) // 2))
        for number, line in enumerate(text):
            pen.text((MARGIN, top + side + 2 + number * LINE), line, fill="black", font=font)
        top += height
    content = io.BytesIO()
    sheet.save(content, format="PNG")
    write_atomically(path, content.getbuffer())


def _reduced(file: Path, side: int) -> Image.Image:
    with Image.open(file) as opened:
        picture = opened.convert("RGB")
    factor = side / max(picture.size)
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _middle(file: Path, side: int) -> Image.Image:
    with Image.open(file) as picture:
        left, top = max(0, (picture.width - side) // 2), max(0, (picture.height - side) // 2)
        return picture.convert("RGB").crop(
            (left, top, min(picture.width, left + side), min(picture.height, top + side))
        )
