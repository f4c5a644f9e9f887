"""How far a generation is, and how long it will still take."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

# Before the first picture is decoded nobody knows how long that takes; on the embedded base it is about this.
DECODE_STEPS = 3.0


class Estimate:
    """Seconds left, from what steps of each stage took so far.

    Args:
        pictures: For each picture the work of each stage: tokens times steps. Decoding counts as a few steps of the
            refinement until it was seen once.
    """

    def __init__(self, pictures: list[Mapping[str, float]]):
        self.pictures = pictures
        self.done: dict[str, float] = {}
        self.seconds: dict[str, float] = {}

    def add(self, stage: str, work: float, seconds: float) -> None:
        """Note that `work` of a stage took `seconds`."""
        self.done[stage] = self.done.get(stage, 0.0) + work
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    def left(self) -> float | None:
        """Seconds until everything is done; `None` before the first step."""
        total = sum(self.seconds.values())
        if not total or not sum(self.done.values()):
            return None
        overall = total / sum(self.done.values())
        left = 0.0
        for stage in {stage for picture in self.pictures for stage in picture}:
            work = sum(picture.get(stage, 0.0) for picture in self.pictures) - self.done.get(stage, 0.0)
            rate = self.seconds[stage] / self.done[stage] if self.done.get(stage) else overall
            left += max(0.0, work) * rate
        return left


class TimeLeft(ProgressColumn):
    """The estimate, as h:mm:ss."""

    def __init__(self, estimate: Estimate):
        super().__init__()
        self.estimate = estimate

    def render(self, task: Task) -> Text:
        """`-:--:--` before the first step."""
        left = self.estimate.left()
        if left is None:
            return Text("-:--:-- left", style="progress.remaining")
        minutes, seconds = divmod(round(left), 60)
        return Text(f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d} left", style="progress.remaining")


class GenerationProgress:
    """One bar over all pictures and stages.

    Args:
        work: For each picture the work of each stage, in the order in which they run.
        console: Where it is shown.
    """

    def __init__(self, work: Sequence[Mapping[str, float]], console: Console):
        self.work, self.current, self.console = work, -1, console
        self.estimate = Estimate(list(work))
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeLeft(self.estimate), console=console
        )
        self.task = self.bar.add_task("", total=sum(sum(stages.values()) for stages in work))
        self.last = time.perf_counter()

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def skip(self) -> None:
        """The next picture is not made here."""
        self.current += 1
        self.estimate.pictures[self.current] = {}
        self.bar.update(self.task, total=sum(sum(stages.values()) for stages in self.estimate.pictures))

    def begin(self) -> None:
        """The next picture begins."""
        self.current += 1
        self.last = time.perf_counter()
        self._describe("decode" if self.work[self.current].keys() == {"decode"} else "text")

    def step(self, stage: str, done: int, steps: int) -> None:
        """A step of a stage is done; `ScaleDiTPipeline`'s `progress` callback."""
        self._note(stage, self.work[self.current].get(stage, 0.0) / steps)
        self._describe(f"{stage} {done}/{steps}" if done < steps or stage == "draft" else "decode")

    def end(self) -> None:
        """The picture is done; stages that were there already count as done."""
        self._note("decode", self.work[self.current].get("decode", 0.0))
        done = sum(sum(stages.values()) for stages in self.estimate.pictures[: self.current + 1])
        self.bar.update(self.task, completed=done)

    def _note(self, stage: str, work: float) -> None:
        now = time.perf_counter()
        self.estimate.add(stage, work, now - self.last)
        self.bar.advance(self.task, work)
        self.last = now

    def _describe(self, stage: str) -> None:
        self.bar.update(self.task, description=f"picture {self.current + 1}/{len(self.work)}: {stage}")
