"""What pictures of full bases' shapes take, from the tables of measure.py into README.md and the figures.

python experiments/memory/measure.py ...        on a GPU, see README.md
python experiments/memory/run.py
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from scale_dit.errors import UserError
from scale_dit.evaluation.figures import FigureRow, figures_file, merge_rows, read_figures, rounded
from scale_dit.evaluation.quotes import update_document
from scale_dit.evaluation.studies import fill_table

HERE = Path(__file__).parent
STAGES = ("text", "draft", "refine", "decode")
SIDES = {"2048": "2k", "4096": "4k", "8192": "8k"}
"""Sizes that figures are of; others are in the tables alone."""
FIRST = "flux1_dev"
"""The base whose figures have names without it."""
STOCK = ("stock_eager", "stock_compiled")
MACHINE = ("machine", "versions")
PROVENANCE = ("command", "machine", "versions", "commit", "date")
KINDS = {
    "stock_eager": "stock, dense", "stock_compiled": "stock, dense, compiled", "windowed_eager": "windowed",
    "windowed_parts": "windowed, feed-forward by parts",
    "windowed_low_memory": "windowed, feed-forward by parts, keys and values on the host",
    "windowed_compiled": "windowed, compiled",
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


def named(name: str, row: Row) -> str:
    """A figure's name, with the base's in front of it."""
    return name if row["base"] == FIRST else f"{row['base']}_{name}"


def step_figures(rows: Sequence[Row]) -> list[FigureRow]:
    """The windowed step at 4096 px over the stock one: the fastest, and memory, both eager, keys and values on the card
    where that was measured."""
    found = []
    for base in dict.fromkeys(row["base"] for row in rows):
        found += _step_figures({row["kind"]: row for row in rows if (row["base"], row["px"]) == (base, "4096")})
    return found


def _step_figures(kinds: Mapping[str, Row]) -> list[FigureRow]:
    found = []
    ours = [row for name, row in kinds.items() if name in ("windowed_eager", "windowed_parts", "windowed_compiled")]
    if ours and "stock_compiled" in kinds:
        best = min(ours, key=lambda row: float(row["seconds"]))
        ratio = float(best["seconds"]) / float(kinds["stock_compiled"]["seconds"])
        found.append(figure(named("step_4k_over_dense", best), ratio, "ratio", best))
    least = kinds.get("windowed_parts", kinds.get("windowed_low_memory"))
    if least is not None and "stock_eager" in kinds:
        stock = kinds["stock_eager"]
        ratio = float(least["peak_gb"]) / float(stock["peak_gb"])
        found.append(figure(named("refine_4k_memory_over_dense", least), ratio, "ratio", least))
    return found


def seconds(row: Row, column: str = "seconds") -> float:
    """Seconds of a stage in a picture of all steps; extrapolated where fewer were measured."""
    share = int(row["full_steps"]) / int(row["steps"]) if row["stage"] in ("draft", "refine") else 1.0
    return share * float(row[column])


def is_extrapolated(row: Row) -> bool:
    """Whether fewer steps of a stage were measured than a picture has."""
    return row["steps"] != row["full_steps"] and row["stage"] in ("draft", "refine")


def dense_pictures(steps: Sequence[Row], pictures: Sequence[Row]) -> list[Row]:
    """What stock, dense refinement would take: its faster measured step times a picture's steps, extrapolated."""
    found = []
    for picture in pictures:
        where = picture["base"], picture["px"]
        stock = [row for row in steps if row["kind"] in STOCK and (row["base"], row["px"]) == where]
        if stock and picture["stage"] == "refine" and not picture["cap_gb"]:
            best = min(stock, key=lambda row: float(row["seconds"]))
            found.append({**best, "stage": "refine", "steps": "1", "full_steps": picture["full_steps"]})
    return found


def picture_figures(rows: Sequence[Row]) -> list[FigureRow]:
    """Seconds and peaks of pictures without a cap, and the largest errors of their plans."""
    found = []
    free = [row for row in rows if not row["cap_gb"]]
    for row in free:
        if (side := SIDES.get(row["px"], "2k")) != "2k":
            unit = "s, extrapolated" if is_extrapolated(row) else "s"
            name = named(f"picture_{side}_seconds_{row['stage']}", row)
            found.append(figure(name, seconds(row), unit, row, int(row["steps"])))
            name = named(f"picture_{side}_peak_gb_{row['stage']}", row)
            found.append(figure(name, float(row["peak_gb"]), "GB", row))
    errors = []
    for where in dict.fromkeys((row["base"], row["px"]) for row in free):
        stages = [row for row in free if (row["base"], row["px"]) == where]
        taken, planned = (sum(seconds(row, column) for row in stages) for column in ("seconds", "planned_seconds"))
        errors.append(abs(planned / taken - 1))
    if free:
        found.append(figure("plan_error_seconds", max(errors), "share", free[-1], len(errors)))
        memory = [abs(float(row["planned_peak_gb"]) / float(row["peak_gb"]) - 1) for row in rows]
        found.append(figure("plan_error_memory", max(memory), "share", free[-1], len(memory)))
    return found


def least_figures(rows: Sequence[Row]) -> list[FigureRow]:
    """The least memory: the cap under which draft, refine and decode ran, or what encoding the prompts takes."""
    return [
        figure(
            named(f"min_gpu_gb_{SIDES[row['px']]}", row),
            max(float(row["least_cap_gb"]), float(row["text_peak_gb"])), "GB", row,
        )
        for row in rows
        if row["px"] in SIDES
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
        lines = [[row["base"], row["px"], KINDS[row["kind"]], row["seconds"], row["peak_gb"]] for row in steps]
        fill_table(readme, ["base", "px", "one step", "s", "peak GB"], lines, "steps")
    if pictures:
        lines = [
            [
                row["base"], row["px"], row["cap_gb"] or "none", row["stage"], *_beside(row), row["planned_peak_gb"],
                row["peak_gb"], row["way"].replace("memory.", ""),
            ]
            for row in pictures
        ]  # fmt: skip
        lines += [
            [row["base"], row["px"], "none", "refine", "1", "", f"{seconds(row):.3g} (extrapolated)", "",
             row["peak_gb"], KINDS[row["kind"]]]
            for row in dense_pictures(steps, pictures)
        ]  # fmt: skip
        header = ["base", "px", "cap, GB", "stage", "steps", "planned s", "s", "planned GB", "GB", "memory"]
        fill_table(readme, header, lines, "pictures")
    if least:
        lines = [
            [row[name] for name in ("base", "px", "least_cap_gb", "peak_gb", "text_peak_gb", "refine_seconds_a_step")]
            for row in least
        ]
        fill_table(readme, ["base", "px", "least cap, GB", "peak GB", "encoding, GB", "s a step"], lines, "least")
    update_document(readme, read_figures(figures_file()))


def _beside(row: Row) -> tuple[str, str, str]:
    """Steps, planned and measured seconds of a whole picture."""
    mark = " (extrapolated)" if is_extrapolated(row) else ""
    return row["steps"], f"{seconds(row, 'planned_seconds'):.3g}", f"{seconds(row):.3g}{mark}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, default=HERE, help="folder of the tables of measure.py")
    tables = parser.parse_args().tables
    steps, pictures, least = (read(tables / f"{name}.csv") for name in ("steps", "pictures", "least"))
    if not (steps or pictures or least):
        raise UserError(f"there is no table in {tables}: write them with experiments/memory/measure.py, on a GPU")
    dense = [
        figure(named(f"dense_{SIDES[row['px']]}_seconds_refine", row), seconds(row), "s, extrapolated", row, 1)
        for row in dense_pictures(steps, pictures)
        if row["px"] in SIDES
    ]
    measured = [*step_figures(steps), *picture_figures(pictures), *dense, *least_figures(least)]
    merge_rows(measured, figures_file())
    write_tables(steps, pictures, least, measured)


if __name__ == "__main__":
    main()
