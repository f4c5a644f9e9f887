"""One picture that shows every arm side by side: a row for each prompt, a column for each arm."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap

from PIL import Image, ImageDraw, ImageFont

from scale_dit.errors import UserError

MARGIN = 12
LINE = 20
FONT_SIZE = 15


def write_picture_grid(
    path: Path, rows: Sequence[Sequence[Path | None]], columns: Sequence[str], prompts: Sequence[str], side: int = 320
) -> None:
    """Draw pictures, reduced to at most `side` pixels, with the arms' names above and each row's prompt below.

    Args:
        path: the PNG to write.
        rows: for each prompt the files of all arms; None leaves a gap.
        columns: names of the arms.
        prompts: text of each row.
        side: longer side of a cell in pixels.

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
                _paste(sheet, file, MARGIN + column * (side + MARGIN), top, side)
        for number, line in enumerate(text):
            pen.text((MARGIN, top + side + 2 + number * LINE), line, fill="black", font=font)
        top += height
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    sheet.save(unfinished, format="PNG")
    os.replace(unfinished, path)


def _paste(sheet: Image.Image, file: Path, left: int, top: int, side: int) -> None:
    with Image.open(file) as picture:
        reduced = picture.convert("RGB")
    factor = side / max(reduced.size)
    size = (max(1, round(reduced.width * factor)), max(1, round(reduced.height * factor)))
    sheet.paste(reduced.resize(size, Image.Resampling.LANCZOS), (left, top + (side - size[1]) // 2))
