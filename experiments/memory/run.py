"""What pictures of full-size bases take, from the tables of measure.py into README.md and the figures.

python experiments/memory/measure.py ...        on a GPU, see README.md
python experiments/memory/run.py
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from scale_dit.errors import UserError
from scale_dit.evaluation.figures import FigureRow, figures_file, merge_rows, read_figures, rounded
from scale_dit.evaluation.quotes import update_document
from scale_dit.evaluation.studies import fill_table
from scale_dit.models.random_weights import base_settings
from scale_dit.models.shapes import SHAPES

HERE = Path(__file__).parent
STAGES = ("text", "draft", "refine", "decode")
SIDES = {"2048": "2k", "4096": "4k", "8192": "8k"}
BASE = "flux1_dev"
"""Whose pictures the figures are of."""
MACHINE = ("machine", "versions")
PROVENANCE = ("command", "machine", "versions", "commit", "date")
KINDS = {
    "stock_eager": "stock, dense", "stock_compiled": "stock, dense, compiled", "windowed_eager": "windowed",
    "windowed_parts": "windowed, feed-forward by parts",
    "windowed_low_memory": "windowed, feed-forward by parts, keys and values on the host",
    "windowed_compiled": "windowed, compiled",
    "windowed_parts_compiled": "windowed, feed-forward by parts, compiled",
    "windowed_low_memory_compiled": "windowed, feed-forward by parts, keys and values on the host, compiled",
}  # fmt: skip

Row = Mapping[str, str]


def read(path: Path) -> list[Row]:
    """The rows of one table, all of one machine; none if there is no such table.

    Raises:
        UserError: they are from different machines or versions.
    """
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for column in MACHINE:
        if len(found := sorted({row[column] for row in rows})) > 1:
            raise UserError(
                f"rows of {path} differ in {column} ({'; '.join(found)}), but they are compared with each other: "
                f"delete the older ones, or measure all anew"
            )
    return rows


def figure(name: str, value: float, unit: str, row: Row, n: int | None = None) -> FigureRow:
    """A figure that was measured where a row was."""
    return FigureRow(name, rounded(value), unit, None, None, n, **{key: row[key] for key in PROVENANCE})


def step_figures(rows: Sequence[Row]) -> list[FigureRow]:
    """The windowed step at 4096 px over the stock one of the same command, the last one that has both: seconds, of the
    fastest; memory, both eager, keys and values on the card where that was measured; memory, both compiled, keys and
    values on the host."""
    commands: dict[str, dict[str, Row]] = {}
    for row in rows:
        if (row["base"], row["px"]) == (BASE, "4096"):
            commands.setdefault(row["command"], {})[row["kind"]] = row
    found: dict[str, FigureRow] = {}
    for kinds in commands.values():
        ours = [row for kind, row in kinds.items() if kind.startswith("windowed") and "low_memory" not in kind]
        best = min(ours, key=lambda row: float(row["seconds"]), default=None)
        least = kinds.get("windowed_parts", kinds.get("windowed_low_memory"))
        for name, column, row, stock in (
            ("step_4k_over_dense", "seconds", best, "stock_compiled"),
            ("refine_4k_memory_over_dense", "peak_gb", least, "stock_eager"),
            ("refine_4k_memory_over_dense_compiled", "peak_gb", kinds.get("windowed_low_memory_compiled"),
             "stock_compiled"),
        ):  # fmt: skip
            if row is not None and stock in kinds:
                found[name] = figure(name, float(row[column]) / float(kinds[stock][column]), "ratio", row)
    return list(found.values())


@lru_cache
def full_steps(base: str) -> int:
    """Steps of a base."""
    return base_settings(base).steps


def picture_figures(rows: Sequence[Row]) -> list[FigureRow]:
    """Seconds and peaks of whole pictures without a cap, and the largest errors of all plans.

    Of seconds that is of a picture, of memory of its peak and, as a figure of its own, of a stage.
    """
    found = []
    for row in filter(is_whole, rows):
        if (side := SIDES.get(row["px"])) in ("4k", "8k") and row["base"] == BASE:
            name = f"picture_{side}_seconds_{row['stage']}"
            found.append(figure(name, float(row["seconds"]), "s", row, int(row["steps"])))
            found.append(figure(f"picture_{side}_peak_gb_{row['stage']}", float(row["peak_gb"]), "GB", row))
    pictures: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        pictures.setdefault((row["base"], row["px"], row["cap_gb"]), []).append(row)
    errors = {"plan_error_seconds": [error(stages, "seconds", sum) for stages in pictures.values()],
              "plan_error_memory": [error(stages, "peak_gb", max) for stages in pictures.values()],
              "plan_error_memory_of_a_stage": [error([row], "peak_gb", max) for row in rows]}  # fmt: skip
    found += [figure(name, max(each), "share", rows[-1], len(each)) for name, each in errors.items() if each]
    return found


def is_whole(row: Row) -> bool:
    """Whether the picture had all of its base's steps, and the card."""
    return not row["cap_gb"] and int(row["steps"]) == full_steps(row["base"])


def error(stages: Sequence[Row], column: str, total: Callable[[Iterable[float]], float]) -> float:
    """By how much what was planned for some stages differs from what they took, as a share."""
    taken, planned = (total(float(row[name]) for row in stages) for name in (column, f"planned_{column}"))
    return abs(planned / taken - 1)


def least_figures(rows: Sequence[Row]) -> list[FigureRow]:
    """The least memory: the cap under which draft, refine and decode ran, or what encoding the prompts takes."""
    return [
        figure(f"min_gpu_gb_{SIDES[row['px']]}", max(float(row["least_cap_gb"]), float(row["text_peak_gb"])),
               "GB", row)
        for row in rows
        if row["base"] == BASE
    ]  # fmt: skip


def write_tables(
    steps: Sequence[Row], pictures: Sequence[Row], least: Sequence[Row], figures: Sequence[FigureRow]
) -> None:
    """The tables of README.md, and the figures quoted in it."""
    readme = HERE / "README.md"
    quoted = [[each.name, f"<!-- figure:{each.name} .3g --><!-- /figure -->", each.unit] for each in figures]
    if quoted:
        fill_table(readme, ["figure", "", ""], quoted, "figures")
    if steps:
        newest = {(row["base"], row["px"], row["kind"]): row for row in steps}.values()
        lines = [[row["base"], row["px"], KINDS[row["kind"]], row["seconds"], row["peak_gb"]] for row in newest]
        fill_table(readme, ["base", "px", "one step", "s", "peak GB"], lines, "steps")
    if pictures:
        lines = [
            [
                row["base"], row["px"], row["cap_gb"] or "none", row["stage"], row["steps"],
                f"{float(row['planned_seconds']):.3g}", f"{float(row['seconds']):.3g}", row["planned_peak_gb"],
                row["peak_gb"], row["way"].replace("memory.", ""),
            ]
            for row in pictures
        ]  # fmt: skip
        header = ["base", "px", "cap, GB", "stage", "steps", "planned s", "s", "planned GB", "GB", "memory"]
        fill_table(readme, header, lines, "pictures")
    if least:
        lines = [
            [
                row["base"],
                row["px"],
                row["least_cap_gb"],
                row["peak_gb"],
                row["text_peak_gb"],
                row["refine_seconds_a_step"],
            ]
            for row in least
        ]
        fill_table(readme, ["base", "px", "least cap, GB", "peak GB", "encoding, GB", "s a step"], lines, "least")
    if dense := beside_dense(steps, pictures):
        header = [
            "base",
            "px",
            "one dense step, s",
            "dense refinement, s (extrapolated)",
            "windowed refinement, s",
            "share",
        ]
        fill_table(readme, header, dense, "dense")
    update_document(readme, read_figures(figures_file()))


def beside_dense(steps: Sequence[Row], pictures: Sequence[Row]) -> list[list[str]]:
    """Refinement of whole pictures beside as many of the stock transformer's dense steps."""
    stock = {(row["base"], row["px"]): float(row["seconds"]) for row in steps if row["kind"] == "stock_eager"}
    lines = []
    for row in pictures:
        where = row["base"], row["px"]
        if row["stage"] == "refine" and is_whole(row) and where in stock:
            dense, ours = full_steps(row["base"]) * stock[where], float(row["seconds"])
            lines.append([*where, f"{stock[where]:.3g}", f"{dense:.3g}", f"{ours:.3g}", f"{ours / dense:.3f}"])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, default=HERE, help="folder of the tables of measure.py")
    tables = parser.parse_args().tables
    pictures, least = (read(tables / f"{name}.csv") for name in ("pictures", "least"))
    steps = [
        {"base": base, **row}
        for base in SHAPES["full"]
        for row in read(tables / ("steps.csv" if base == BASE else f"steps_{base}.csv"))
    ]
    if not (steps or pictures or least):
        raise UserError(f"there is no table in {tables}: write them with experiments/memory/measure.py, on a GPU")
    measured = [*step_figures(steps), *picture_figures(pictures), *least_figures(least)]
    merge_rows(measured, figures_file())
    write_tables(steps, pictures, least, measured)


if __name__ == "__main__":
    main()
