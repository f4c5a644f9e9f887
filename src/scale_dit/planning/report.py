"""The plan of a run as tables: what is predicted before it, and what it took beside that after it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from rich.table import Table

from scale_dit.autoencoder.tiles import ERRORS
from scale_dit.pipeline_output import StageCost
from scale_dit.planning.predict import STAGES, Prediction, gb


def before(prediction: Prediction, pictures: int, limit: int, machine: str) -> Table:
    """What one picture will take, the largest of the run.

    Args:
        pictures: How many are to be made.
        limit: Bytes that may be used.
        machine: What the seconds are for.
    """
    table = Table(title=f"Plan: {prediction.width} x {prediction.height} px, one of {pictures}", title_justify="left")
    for header in ("stage", "seconds", "peak GB"):
        table.add_column(header, justify="left" if header == "stage" else "right")
    for stage in STAGES:
        if stage in prediction.seconds:
            table.add_row(stage, seconds(prediction.seconds[stage]), gb(prediction.peak_bytes[stage]))
    table.add_row("in all", seconds(sum(prediction.seconds.values())), f"{gb(prediction.peak)} of {gb(limit)}")
    table.caption = f"{machine}; {prediction.memory}"
    if prediction.memory.decode == "tiled":
        table.caption += f"; {ERRORS}"
    return table


class Actual:
    """Adds up what pictures took beside what was predicted for them.

    Attributes:
        ahead: What stages took that were run for all pictures beforehand.
    """

    def __init__(self) -> None:
        self.pictures = 0
        self.ahead = StageCost()
        self.predicted: defaultdict[str, float] = defaultdict(float)
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.predicted_peak: dict[str, int] = {}
        self.peak: dict[str, int] = {}

    def add(self, prediction: Prediction, seconds: Mapping[str, float], peak_bytes: Mapping[str, int]) -> None:
        """Note a picture that was made."""
        self.pictures += 1
        for stage, predicted in prediction.seconds.items():
            self.predicted[stage] += predicted
            self.predicted_peak[stage] = max(self.predicted_peak.get(stage, 0), prediction.peak_bytes[stage])
            if stage in self.ahead.seconds:
                continue
            self.seconds[stage] += seconds.get(stage, 0.0)
            if stage in peak_bytes:
                self.peak[stage] = max(self.peak.get(stage, 0), peak_bytes[stage])

    def table(self) -> Table:
        """Predicted beside actual, summed over pictures; peaks are those of the largest."""
        table = Table(title=f"Predicted and actual, {self.pictures} pictures", title_justify="left")
        taken, peaks = self.seconds | self.ahead.seconds, self.peak | self.ahead.peak_bytes
        table.add_column("stage")
        for header in ("predicted s", "actual s", "predicted GB", "actual GB"):
            table.add_column(header, justify="right")
        for stage in (name for name in STAGES if name in self.predicted):
            peak = gb(peaks[stage]) if stage in peaks else "-"
            row = seconds(self.predicted[stage]), seconds(taken[stage]), gb(self.predicted_peak[stage]), peak
            table.add_row(stage, *row)
        table.add_row("in all", seconds(sum(self.predicted.values())), seconds(sum(taken.values())), "", "")
        return table


def seconds(value: float) -> str:
    """Three digits, or whole seconds."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
