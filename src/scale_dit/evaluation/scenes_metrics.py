"""Scene accuracies: does the picture hold what its caption says? The scene parser judges, not a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from scale_dit.evaluation.intervals import bootstrap_mean, bootstrap_ratio, wilson
from scale_dit.evaluation.metric import Figure, PictureMetric, Record
from scale_dit.picture_files import to_float

if TYPE_CHECKING:
    from scale_dit.data.world import Scene

# Pictures are right or wrong in these; the others are shares of a picture's objects or pairs.
YES_OR_NO = ("count", "colour", "draft_count")


class SceneAccuracy(PictureMetric):
    """Accuracies of an arm against the scenes that its prompts describe.

    Figures: `count` (as many objects as described), `colour` (the same colours, each as often, so the count is right
    too), `place`, `shape` and `relation` (share of described objects in place or of the right shape, and of pairs in
    the right order), and `objects` (found per picture: a mosaic holds dozens). Where records carry drafts also
    `draft_count` and `count_retention`: the arm's count accuracy over that of its own native-size drafts.
    """

    name = "scenes"
    needs = ("prompts made from procedural scenes",)

    def update(self, arm: str, images: Tensor, prompts: Sequence[str], records: Sequence[Record]) -> None:
        """Judge the pictures whose records carry a scene, and their drafts."""
        for image, record in zip(images, records, strict=True):
            if record.scene is None:
                continue
            for name, value in judge(image, record.scene).items():
                self._add(arm, name, record.index, value)
            if record.draft is not None:
                self._add(arm, "draft_count", record.index, judge(record.draft, record.scene)["count"])

    def compute(self, arm: str) -> dict[str, Figure]:
        """Means with Wilson intervals for shares of pictures, bootstrap intervals for the others."""
        values = self.per_picture(arm)
        figures = {name: _figure(name, list(per_picture.values())) for name, per_picture in values.items()}
        if "draft_count" in values:
            figures |= self._retention(values)
        return figures

    @staticmethod
    def _retention(values: Mapping[str, Mapping[int, float]]) -> dict[str, Figure]:
        indices = sorted(values["draft_count"])
        made = [values["count"][index] for index in indices]
        draft = [values["draft_count"][index] for index in indices]
        if not any(draft):
            return {}
        low, high = bootstrap_ratio(made, draft)
        ratio = float(np.mean(made) / np.mean(draft))
        note = "count accuracy over that of the arm's own drafts"
        return {"count_retention": Figure(ratio, low, high, len(indices), "ratio", note)}


def judge(image: Tensor, scene: Scene) -> dict[str, float]:
    """Values of one picture `[3, H, W]` (uint8 or float in [0, 1]) against its scene; undefined ones are left out."""
    from scale_dit.data.parser import parse
    from scale_dit.data.scene_score import score

    found = score(scene, parse(to_float(image)))
    values = {
        "count": found.count_correct,
        "colour": found.colours_correct,
        "place": found.place_accuracy,
        "shape": found.shape_accuracy,
        "relation": found.relation_accuracy,
        "objects": found.found,
    }
    return {name: float(value) for name, value in values.items() if value is not None}


def _figure(name: str, values: Sequence[float]) -> Figure:
    mean = float(np.mean(values))
    if name in YES_OR_NO:
        return Figure(mean, *wilson(sum(values), len(values)), len(values), "share", "Wilson interval")
    unit = "objects per picture" if name == "objects" else "share"
    return Figure(mean, *bootstrap_mean(values), len(values), unit, "bootstrap over pictures")
