"""How well found objects agree with a scene's description: count, colours, places, shapes and relations."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import linear_sum_assignment

from scale_dit.data.visibility import VisibleObject, visible_objects
from scale_dit.data.world import Scene
from scale_dit.errors import UserError

if TYPE_CHECKING:
    from scale_dit.data.parser import FoundObject

# Captions name a ninth of the picture; this is a little less than half of its diagonal.
PLACE_TOLERANCE = 0.2


@dataclass(frozen=True)
class SceneScore:
    """Agreement of one picture with one description.

    Attributes:
        expected: Number of visible objects in the description.
        found: Number of objects in the picture.
        count_correct: Whether these are equal.
        colours_correct: Whether the colours are the same ones, each as often.
        matched: Described objects with a found one of the same colour, one to one.
        place_accuracy: Share of described objects found within the tolerance of their centre; None if none described.
        shape_accuracy: Share of described objects found with the right shape; None if none described.
        relation_accuracy: Share of pairs that lie left, right, above or below each other as described; None without
            a pair.
    """

    expected: int
    found: int
    count_correct: bool
    colours_correct: bool
    matched: int
    place_accuracy: float | None
    shape_accuracy: float | None
    relation_accuracy: float | None


def score(scene: Scene, found: Sequence[FoundObject], place_tolerance: float = PLACE_TOLERANCE) -> SceneScore:
    """Compare found objects with what `visible_objects` says of the scene.

    Args:
        scene: The description.
        found: What `scale_dit.data.parser.parse` found in the picture.
        place_tolerance: Largest distance between described and found centre, in shorter sides of the frame.
    """
    expected = visible_objects(scene)
    pairs = match(scene, expected, found)
    in_place = sum(_distance(scene, expected[i], found[j]) <= place_tolerance for i, j in pairs.items())
    right_shape = sum(expected[i].item.shape == found[j].shape for i, j in pairs.items())
    relations = [
        i in pairs and k in pairs and _same_relation(expected[i], expected[k], found[pairs[i]], found[pairs[k]])
        for i, k in itertools.combinations(range(len(expected)), 2)
    ]
    return SceneScore(
        expected=len(expected),
        found=len(found),
        count_correct=len(expected) == len(found),
        colours_correct=Counter(seen.item.colour for seen in expected) == Counter(item.colour for item in found),
        matched=len(pairs),
        place_accuracy=in_place / len(expected) if expected else None,
        shape_accuracy=right_shape / len(expected) if expected else None,
        relation_accuracy=sum(relations) / len(relations) if relations else None,
    )


def match(scene: Scene, expected: Sequence[VisibleObject], found: Sequence[FoundObject]) -> dict[int, int]:
    """Pair described with found objects of the same colour, one to one, at the smallest total distance."""
    if not expected or not found:
        return {}
    other_colour = 1e3
    cost = np.array(
        [
            [_distance(scene, seen, item) if seen.item.colour == item.colour else other_colour for item in found]
            for seen in expected
        ]
    )
    rows, columns = linear_sum_assignment(cost)
    return {int(i): int(j) for i, j in zip(rows, columns, strict=True) if cost[i, j] < other_colour}


def summarise(scores: Sequence[SceneScore]) -> dict[str, float]:
    """Means over pictures: ``count_accuracy``, ``colour_accuracy`` (count and colours), ``recall`` (described
    objects with a match), ``place_accuracy``, ``shape_accuracy``, ``relation_accuracy`` and the number of pictures
    ``n``. Accuracies that no picture defines are NaN.

    Raises:
        UserError: No score at all.
    """
    if not scores:
        raise UserError("No picture was scored: generate and parse at least one.")

    def mean(values: Sequence[float | None]) -> float:
        defined = [value for value in values if value is not None]
        return math.fsum(defined) / len(defined) if defined else math.nan

    return {
        "count_accuracy": mean([item.count_correct for item in scores]),
        "colour_accuracy": mean([item.colours_correct for item in scores]),
        "recall": mean([item.matched / item.expected if item.expected else None for item in scores]),
        "place_accuracy": mean([item.place_accuracy for item in scores]),
        "shape_accuracy": mean([item.shape_accuracy for item in scores]),
        "relation_accuracy": mean([item.relation_accuracy for item in scores]),
        "n": float(len(scores)),
    }


def _distance(scene: Scene, expected: VisibleObject, found: FoundObject) -> float:
    """Distance of two centres in shorter sides of the frame."""
    width, height = scene.extent
    return math.hypot((expected.centre[0] - found.centre[0]) * width, (expected.centre[1] - found.centre[1]) * height)


def _same_relation(first: VisibleObject, second: VisibleObject, found: FoundObject, other: FoundObject) -> bool:
    """Whether the found pair has the described order along the axis on which the described pair is further apart."""
    dx, dy = (first.centre[axis] - second.centre[axis] for axis in (0, 1))
    axis, described = (0, dx) if abs(dx) >= abs(dy) else (1, dy)
    return described * (found.centre[axis] - other.centre[axis]) > 0
