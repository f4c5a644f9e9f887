"""What the studies in `experiments/` share: their tables of results, and held-out scenes drawn and scored."""

from __future__ import annotations

import csv
import datetime
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from scale_dit.data.captions import caption
from scale_dit.data.parser import SceneScore, parse, score, summarise
from scale_dit.data.scenes import Scene
from scale_dit.errors import UserError
from scale_dit.files import csv_text, write_atomically
from scale_dit.pipeline import ScaleDiTPipeline
from scale_dit.provenance import commit, machine, running_command, versions_line


def provenance() -> dict[str, str]:
    """The columns that say how a row was measured: command, machine, versions, date and commit."""
    return {
        "command": running_command(),
        "machine": machine(),
        "versions": versions_line(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
    }


def add_rows(path: Path, rows: Sequence[Mapping[str, object]], keys: Sequence[str]) -> None:
    """Add rows to a study's table, each in place of an older one with the same keys and the same command.

    Args:
        path: a CSV file; made if it is not there.
        rows: at least one, all with the same columns; `provenance` is added to each.
        keys: columns that tell the rows of one command apart.

    Raises:
        UserError: the file has other columns.
    """
    added = [{name: str(value) for name, value in (row | provenance()).items()} for row in map(dict, rows)]
    old: list[dict[str, str]] = []
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            old = list(reader)
        if list(reader.fieldnames or ()) != list(added[0]):
            raise UserError(
                f"{path} has the columns {reader.fieldnames}, the new rows have {list(added[0])}: give another file"
            )
    identity = ("command", *keys)
    replaced = {tuple(row[key] for key in identity) for row in added}
    kept = [row for row in old if tuple(row[key] for key in identity) not in replaced]
    write_atomically(path, csv_text(list(added[0]), [*kept, *added]))


def fill_table(
    document: Path, header: Sequence[str], rows: Sequence[Sequence[str]], mark: str = "table", below: str = ""
) -> None:
    """Put a table between the marks `<!-- mark -->` and `<!-- /mark -->` of a document, each on a line of its own.

    Args:
        document: a Markdown file.
        header, rows: cells.
        mark: which place.
        below: Markdown that follows the table, such as a plot.

    Raises:
        UserError: the document has no such marks.
    """
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    lines += ["", below] if below else []
    between = re.compile(rf"(?<=<!-- {mark} -->\n).*?(?=<!-- /{mark} -->)", re.DOTALL)
    text, found = between.subn(lambda _: "\n".join([*lines, ""]), document.read_text(encoding="utf-8"))
    if not found:
        raise UserError(f"{document} has no place for a table: add the lines <!-- {mark} --> and <!-- /{mark} -->")
    document.write_text(text, encoding="utf-8")


def scene_batches(
    scenes: Sequence[Scene], size: int
) -> Iterator[tuple[Sequence[Scene], list[str], list[torch.Generator]]]:
    """Scenes, their captions, and a generator each, which is seeded by the scene's place in the sequence."""
    for first in range(0, len(scenes), size):
        part = scenes[first : first + size]
        generators = [torch.Generator().manual_seed(first + offset) for offset in range(len(part))]
        yield part, [caption(scene, scene.seed) for scene in part], generators


def scene_scores(scenes: Sequence[Scene], pictures: Tensor) -> list[SceneScore]:
    """What the parser finds in `pictures` (B, 3, height, width; 0 to 1) against the scenes they should show."""
    return [score(scene, parse(picture.cpu())) for scene, picture in zip(scenes, pictures, strict=True)]


def score_drafts(
    pipeline: ScaleDiTPipeline, scenes: Sequence[Scene], size: int, scale: float, guidance_scale: float | None = None
) -> tuple[list[Tensor], dict[str, float]]:
    """Draw drafts of all scenes in batches of `size`, at 1/`scale` of a picture that is `scale` times the native side.

    Returns:
        Latents, a tensor (B, C, h, w) a batch; and the drafts' accuracies.
    """
    side = round(pipeline.settings.native * scale)
    latents, scores = [], []
    for part, prompts, generators in scene_batches(scenes, size):
        made, _ = pipeline.make_drafts(prompts, side, side, scale, None, guidance_scale, generators)
        latents.append(made)
        scores += scene_scores(part, pipeline.decode(made))
    return latents, summarise(scores)
