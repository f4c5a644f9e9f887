"""What of a scene the camera sees: the objects in frame coordinates, with the share that is visible."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

from scale_dit.data.world import SHAPES, Scene, SceneObject

# Below this share of the frame an object is a few stray pixels in a corner, not something to speak of.
SMALLEST_SHARE = 0.003
_SAMPLES = 1500


@dataclass(frozen=True)
class VisibleObject:
    """An object as the frame shows it.

    Attributes:
        item: The object in world coordinates.
        centre: Centre of its visible part, in frame widths and heights from the top left corner.
        size: Diameter of the whole object, in shorter sides of the frame.
        visible: Visible share of its area, above 0 and at most 1.
        share: Share of the frame that it covers.
    """

    item: SceneObject
    centre: tuple[float, float]
    size: float
    visible: float
    share: float


def visible_objects(scene: Scene) -> list[VisibleObject]:
    """Objects that cover at least `SMALLEST_SHARE` of the frame, in the scene's order."""
    seen = (_see(scene, item) for item in scene.objects)
    return [found for found in seen if found is not None and found.share >= SMALLEST_SHARE]


def _see(scene: Scene, item: SceneObject) -> VisibleObject | None:
    left, top, width, height = scene.view
    x, y = item.centre
    radius = item.radius
    if x + radius <= left or x - radius >= left + width or y + radius <= top or y - radius >= top + height:
        return None
    points = _shape_points(item.shape)
    visible = 1.0
    inside_x = left <= x - radius and x + radius <= left + width
    if not (inside_x and top <= y - radius and y + radius <= top + height):
        cosine, sine = radius * math.cos(item.angle), radius * math.sin(item.angle)
        at_x = x + cosine * points[0] - sine * points[1]
        at_y = y + sine * points[0] + cosine * points[1]
        shown = (at_x > left) & (at_x < left + width) & (at_y > top) & (at_y < top + height)
        count = int(np.count_nonzero(shown))
        if not count:
            return None
        visible = count / points.shape[1]
        x, y = float(at_x[shown].mean()), float(at_y[shown].mean())
    area = math.pi * radius**2 * points.shape[1] / _SAMPLES
    return VisibleObject(
        item=item,
        centre=((x - left) / width, (y - top) / height),
        size=item.size / min(width, height),
        visible=visible,
        share=area * visible / (width * height),
    )


@functools.cache
def _shape_points(shape: str) -> np.ndarray:
    """Points ``[2, n]`` spread evenly over the upright shape of circumscribed radius 1 (a sunflower, cut to it)."""
    index = np.arange(_SAMPLES)
    length, angle = np.sqrt((index + 0.5) / _SAMPLES), index * math.pi * (3 - math.sqrt(5))
    x, y = length * np.cos(angle), length * np.sin(angle)
    return np.stack([x, y])[:, inside_shape(shape, x, y)]


def inside_shape(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points lie inside the upright shape of circumscribed radius 1 around the origin."""
    a, b = SHAPES[shape]
    length = np.hypot(x, y)
    if shape in ("circle", "ring"):
        return np.abs(length - a) <= b
    if shape == "cross":
        return (np.maximum(np.abs(x), np.abs(y)) <= a) & (np.minimum(np.abs(x), np.abs(y)) <= b)
    sector = 2 * math.pi / a
    angle = np.arctan2(x, -y) - (math.pi / 4 if shape == "square" else 0.0)
    angle = np.abs(angle - np.round(angle / sector) * sector)
    edge_x, edge_y = b * math.cos(sector / 2) - 1, b * math.sin(sector / 2)
    return (length * np.cos(angle) - 1) * edge_y - length * np.sin(angle) * edge_x <= 0
