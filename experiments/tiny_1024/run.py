"""Gather evaluations of the embedded base at 1024 px into results.csv, the table in README.md, and the figures.

python src/eval.py base=tiny n=200 'metrics=[scenes,detail]' '+baseline=[...]'      on a GPU, see README.md
python experiments/tiny_1024/run.py EVALUATION_FOLDER ...
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
from pathlib import Path

from scale_dit.evaluation.figures import FigureRow, figures_file, merge_rows, rounded
from scale_dit.evaluation.studies import fill_table

HERE = Path(__file__).parent
METRICS = ("count", "colour", "place", "detail", "count_retention")
ARMS = {
    "from_draft": "Scale-DiT, start 0.7",
    "from_noise": "Scale-DiT, from noise",
    "from_draft_no_lora": "without LoRA, start 0.7",
    "no_lora": "without LoRA, from noise",
    "no_guidance": "windows without guidance",
    "dense": "dense attention",
    "bicubic": "draft, enlarged bicubically",
}
# Arm of the evaluation -> suffix of its figures.
FIGURES = {
    "from_draft": "scale_dit",
    "from_noise": "scale_dit_from_noise",
    "from_draft_no_lora": "no_lora_from_draft",
    "no_lora": "no_lora",
    "no_guidance": "no_guidance",
    "dense": "dense",
    "bicubic": "bicubic",
}


def read(folder: Path) -> tuple[list[dict[str, str]], dict[str, str]]:
    """Rows of one evaluation, and where it ran."""
    with (folder / "results.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["arm"] in ARMS and row["metric"] in METRICS]
    record = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return rows, {key: str(record[key]) for key in ("command", "machine", "versions", "commit")}


def figure_name(arm: str, metric: str) -> str | None:
    """The figure that a row is, by the names that documents quote; `None` if it is none."""
    if metric == "count_retention":
        return {"from_draft": "count_retention_1024", "from_noise": "count_retention_1024_from_noise"}.get(arm)
    return f"{metric}_1024_{FIGURES[arm]}" if metric in ("count", "colour", "detail") else None


def figure(row: dict[str, str], where: dict[str, str], date: str) -> FigureRow | None:
    name = figure_name(row["arm"], row["metric"])
    if name is None or not row["value"]:
        return None
    value, low, high = (rounded(float(row[key])) if row[key] else None for key in ("value", "low", "high"))
    number = int(row["n"]) if row["n"] else None
    return FigureRow(name, value, row["unit"], low, high, number, **where, date=date)


def write_table(rows: list[dict[str, str]]) -> None:
    """Put the results between the marks in README.md."""
    values = {(row["arm"], row["metric"]): row for row in rows}
    lines = []
    for arm, label in ARMS.items():
        cells = [values.get((arm, metric)) for metric in METRICS]
        if any(cells):
            lines.append([label, *map(cell_text, cells)])
    fill_table(HERE / "README.md", ["arm", *(metric.replace("_", " ") for metric in METRICS)], lines)


def cell_text(cell: dict[str, str] | None) -> str:
    if cell is None or not cell["value"]:
        return ""
    interval = f" ({float(cell['low']):.2f} to {float(cell['high']):.2f})" if cell["low"] and cell["high"] else ""
    return f"{float(cell['value']):.3f}{interval}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="output folders of src/eval.py")
    parser.add_argument("--commit", help="the commit that ran, where the evaluating machine had no checkout")
    options = parser.parse_args()
    gathered, figures = [], []
    for folder in options.folders:
        rows, where = read(folder)
        if options.commit:
            where["commit"] = options.commit
        date = datetime.datetime.fromtimestamp((folder / "results.json").stat().st_mtime).date().isoformat()
        gathered += [row | where | {"date": date} for row in rows]
        figures += [found for row in rows if (found := figure(row, where, date))]
    with (HERE / "results.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(gathered[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(gathered)
    write_table(gathered)
    merge_rows(figures, figures_file())


if __name__ == "__main__":
    main()
