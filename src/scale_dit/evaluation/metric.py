"""What a metric is: it is shown pictures, arm by arm, and answers with figures.

A new metric is one class with these members in a file of its own, and one file in `configs/metrics/`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@dataclass(frozen=True)
class Figure:
    """One measured number.

    `low` and `high` are the 95 % interval over pictures (None where the estimator has none), `n` the number of
    pictures, `note` whatever a reader needs to compare the number with another paper's (resizer, crop, versions).
    """

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    unit: str = ""
    note: str = ""


@dataclass(frozen=True)
class Record:
    """What is known about one picture besides its pixels.

    Args:
        index: position in the list of prompts, the same in every arm; arms are paired by it.
        prompt: the text.
        seed: the seed of the noise, the same in every arm.
        scene: the procedural scene that the prompt describes, if there is one.
        reference: the true picture `[3, H, W]` uint8, of the same size as the picture.
        draft: the arm's own native-size draft `[3, h, w]` uint8.
        path: where the picture lies.
        reference_path: where the true picture lies.
    """

    index: int
    prompt: str
    seed: int
    scene: Any = None
    reference: Tensor | None = None
    draft: Tensor | None = None
    path: Path | None = None
    reference_path: Path | None = None


@runtime_checkable
class Metric(Protocol):
    """The contract between the runner and a metric.

    Pictures are streamed: `update` sees one batch at a time and keeps numbers or features, never pictures.

    Attributes:
        name: of the metric in tables and messages.
        needs: files and packages beyond the project's own, in words.
    """

    name: str
    needs: tuple[str, ...]

    def available(self) -> str | None:
        """None if the metric can run, else a sentence that says what is missing and where to put it."""
        ...

    def update(self, arm: str, images: Tensor, prompts: Sequence[str], records: Sequence[Record]) -> None:
        """Take in a batch of one arm's pictures `[B, 3, H, W]`, uint8 or float in [0, 1]."""
        ...

    def compute(self, arm: str) -> dict[str, Figure]:
        """The arm's figures by name, over everything that `update` was shown; empty if it was shown nothing of use."""
        ...

    def per_picture(self, arm: str) -> dict[str, dict[int, float]]:
        """Values by figure name and picture index, for paired differences; empty if there are none per picture."""
        ...


class PictureMetric:
    """Base of metrics that judge pictures one by one: remembers a value per arm, figure name and picture index."""

    needs: tuple[str, ...] = ()

    def __init__(self) -> None:
        self._values: dict[str, dict[str, dict[int, float]]] = {}

    def available(self) -> str | None:
        """None: judging needs nothing but the project itself, unless a metric says otherwise."""
        return None

    def per_picture(self, arm: str) -> dict[str, dict[int, float]]:
        """Values by figure name and picture index."""
        return dict(self._values.get(arm, {}))

    def _add(self, arm: str, name: str, index: int, value: float) -> None:
        self._values.setdefault(arm, {}).setdefault(name, {})[index] = float(value)
