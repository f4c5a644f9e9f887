"""The result of an evaluation as rows, JSON, CSV, a table on the screen, and a flat summary for a logger."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from scale_dit.evaluation.metric import Figure
from scale_dit.files import csv_text, write_atomically


@dataclass(frozen=True)
class Row:
    """One number of one arm; `arm` is `method - baseline` for a paired difference, empty for what could not run."""

    arm: str
    metric: str
    value: float | None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    unit: str = ""
    note: str = ""

    @classmethod
    def of(cls, arm: str, metric: str, figure: Figure) -> Row:
        """The row of a figure."""
        return cls(arm, metric, figure.value, figure.low, figure.high, figure.n, figure.unit, figure.note)


@dataclass
class Results:
    """Everything that an evaluation found.

    Attributes:
        rows: the numbers.
        arms: names, in the order they were given.
        folder: where pictures, `results.json`, `results.csv` and the picture grid lie.
        picture_grid: the picture that shows all arms side by side.
        information: prompts, seeds, settings and versions.
    """

    rows: list[Row]
    arms: list[str]
    folder: Path
    picture_grid: Path | None = None
    information: dict[str, Any] = field(default_factory=dict)

    def row(self, arm: str, metric: str) -> Row | None:
        """The row of an arm and a metric, if there is one."""
        return next((row for row in self.rows if (row.arm, row.metric) == (arm, metric)), None)

    def value(self, arm: str, metric: str) -> float:
        """Raises:
        KeyError: no such number was measured.
        """
        row = self.row(arm, metric)
        if row is None or row.value is None:
            raise KeyError(f"{metric} of {arm} was not measured")
        return row.value

    def unavailable(self) -> dict[str, str]:
        """Metrics that could not run, and why."""
        return {row.metric: row.note for row in self.rows if row.value is None and not row.arm}

    def summary(self) -> dict[str, float]:
        """Flat `arm/metric` numbers, for W&B and the like."""
        return {f"{row.arm}/{row.metric}": row.value for row in self.rows if row.value is not None}

    def write(self) -> None:
        """Write `results.json` and `results.csv`."""
        document = {**self.information, "arms": self.arms, "rows": [asdict(row) for row in self.rows]}
        write_atomically(self.folder / "results.json", json.dumps(document, indent=2, default=str) + "\n")
        table = csv_text([part.name for part in fields(Row)], [asdict(row) for row in self.rows])
        write_atomically(self.folder / "results.csv", table)


def print_results(results: Results, console: Any = None) -> None:
    """Print one table of figures (arms as columns), one of paired differences, and what could not run."""
    from rich.console import Console
    from rich.table import Table

    console = console or Console()
    for title, columns in (("Evaluation", results.arms), ("Paired differences", _differences(results))):
        metrics = _in_order(row.metric for row in results.rows if row.arm in columns)
        if not columns or not metrics:
            continue
        table = Table(title=title)
        table.add_column("metric")
        for column in columns:
            table.add_column(column, justify="right")
        for metric in metrics:
            found = [results.row(column, metric) for column in columns]
            unit = next((row.unit for row in found if row and row.unit), "")
            table.add_row(f"{metric} [dim]{unit}[/dim]", *(_cell(row) for row in found))
        console.print(table)
    for reason, metrics in _by_reason(results).items():
        console.print(f"{', '.join(metrics)}: not measured. {reason}", style="yellow", markup=False)
    if results.picture_grid is not None:
        console.print(f"pictures side by side: {results.picture_grid}", markup=False)
    console.print(f"results: {results.folder / 'results.json'}, {results.folder / 'results.csv'}", markup=False)


def _differences(results: Results) -> list[str]:
    return _in_order(row.arm for row in results.rows if row.arm and row.arm not in results.arms)


def _by_reason(results: Results) -> dict[str, list[str]]:
    """Metrics without a value, of all arms or of one, by what kept them from it."""
    reasons: dict[str, list[str]] = {}
    for row in results.rows:
        if row.value is None:
            reasons.setdefault(row.note, []).append(f"{row.metric} of {row.arm}" if row.arm else row.metric)
    return reasons


def _in_order(names: Any) -> list[str]:
    return list(dict.fromkeys(names))


def _cell(row: Row | None) -> str:
    if row is None or row.value is None:
        return ""
    if row.low is None or row.high is None:
        return f"{row.value:.4g}"
    return f"{row.value:.3g} [dim]({row.low:.3g} to {row.high:.3g})[/dim]"


def cost_rows(arm: str, provenances: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Median seconds per picture and largest peak memory of each stage, from what the pictures' files say."""
    import numpy as np

    rows = []
    seconds = [entry["seconds"] for entry in provenances if entry.get("seconds")]
    for stage in _in_order(stage for entry in seconds for stage in entry):
        times = [entry[stage] for entry in seconds if stage in entry]
        low, middle, high = np.percentile(times, [20, 50, 80])
        note = "median, 20th and 80th percentile over pictures; a batch's time is shared equally"
        rows.append(Row(arm, f"seconds_{stage}", float(middle), float(low), float(high), len(times), "s/picture", note))
    memory = [entry["peak_bytes"] for entry in provenances if entry.get("peak_bytes")]
    for stage in _in_order(stage for entry in memory for stage in entry):
        peaks = [entry[stage] / 2**30 for entry in memory if stage in entry]
        rows.append(
            Row(arm, f"peak_memory_{stage}", max(peaks), n=len(peaks), unit="GiB", note="largest of all batches")
        )
    return rows
