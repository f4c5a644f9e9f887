"""Find the objects of a picture of procedural scenes: colour, shape, place and size of each, without any network."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from scale_dit.data.scene_score import SceneScore, score, summarise
from scale_dit.data.visibility import inside_shape
from scale_dit.data.world import COLOURS, SHAPES
from scale_dit.errors import UserError

__all__ = ["FoundObject", "SceneScore", "classify_colours", "parse", "score", "summarise"]

# All sizes below hold at this resolution: larger pictures are area-averaged down to it first.
WORKING_SIDE = 256
SMOOTHING = 1.0
MINIMUM_CHROMA = 0.28
MINIMUM_SATURATION = 0.33
SMALLEST_SIDE = 0.06
SIMILAR_HUE = math.radians(35)
_GRID = 41
_ANGLE_STEP = math.radians(6)


@dataclass(frozen=True)
class FoundObject:
    """One object found in a picture.

    Attributes:
        colour: A name from `COLOURS`.
        shape: The name from `SHAPES` that overlaps it best.
        centre: Centre of its area, in frame widths and heights from the top left corner.
        size: Diameter of its circumscribed circle, in shorter sides of the frame.
        overlap: Intersection over union with that shape, 0 to 1.
    """

    colour: str
    shape: str
    centre: tuple[float, float]
    size: float
    overlap: float


def parse(image: Tensor) -> list[FoundObject]:
    """Find every object, largest first.

    Pixels far from grey are sorted by hue into the eight object colours; each connected area of one colour above
    `SMALLEST_SIDE` squared (in shorter sides of the frame) is an object, except a smaller one that touches another of
    nearly the same hue. Nothing else is filtered: fragments and mosaics yield many objects, as they should.

    Args:
        image: ``[3, H, W]`` in [0, 1], any resolution and device.

    Raises:
        UserError: Another shape, or values that are not finite.
    """
    pixels = _reduce(image)
    height, width = pixels.shape[1:]
    side = min(height, width)
    hue_class = classify_colours(pixels)
    blobs = [
        (index, mask)
        for index in range(len(COLOURS))
        for mask in _blobs(hue_class == index, SMALLEST_SIDE**2 * side**2)
    ]
    found = []
    for index, mask in _absorb_rims(blobs):
        area = float(mask.sum())
        y, x = (float(value) for value in ndimage.center_of_mass(mask))
        shape, overlap = _best_shape(mask, x, y, area)
        diameter = 2 * math.sqrt(area / _unit_area(shape))
        centre = ((x + 0.5) / width, (y + 0.5) / height)
        found.append((area, FoundObject(tuple(COLOURS)[index], shape, centre, diameter / side, overlap)))
    return [item for _, item in sorted(found, key=lambda pair: -pair[0])]


def classify_colours(pixels: np.ndarray) -> np.ndarray:
    """Index of the object colour of every pixel of ``[3, H, W]``, or -1 for ground; ``[H, W]`` int8."""
    largest, smallest = functools.reduce(np.maximum, pixels), functools.reduce(np.minimum, pixels)
    chroma = largest - smallest
    saturated = (chroma > MINIMUM_CHROMA) & (chroma > MINIMUM_SATURATION * largest)
    classes = np.full(chroma.shape, -1, np.int8)
    red, green, blue = pixels[:, saturated]
    # Hue as an angle in the plane perpendicular to grey: smooth everywhere, unlike the hexagon's six cases.
    hue = np.arctan2(math.sqrt(3) * (green - blue), 2 * red - green - blue)
    classes[saturated] = _apart(hue[:, None], _palette_hues()).argmin(1)
    return classes


@functools.cache
def _palette_hues() -> np.ndarray:
    tones = np.array([tones[0] for tones in COLOURS.values()])
    return np.arctan2(math.sqrt(3) * (tones[:, 1] - tones[:, 2]), 2 * tones[:, 0] - tones[:, 1] - tones[:, 2])


def _reduce(image: Tensor) -> np.ndarray:
    """``[3, H, W]`` float32 with a shorter side of at most `WORKING_SIDE`, slightly smoothed against noise."""
    if image.ndim != 3 or image.shape[0] != 3:
        raise UserError(f"A picture of shape {tuple(image.shape)} cannot be parsed: pass [3, H, W] in [0, 1].")
    pixels = image.detach().float().cpu()
    if not torch.isfinite(pixels).all():
        raise UserError("The picture holds NaN or infinite values: decode it in float32 or check the model's output.")
    height, width = pixels.shape[1:]
    factor = WORKING_SIDE / min(height, width)
    if factor < 1:
        size = (round(height * factor), round(width * factor))
        pixels = torch.nn.functional.interpolate(pixels[None], size=size, mode="area")[0]
    return ndimage.gaussian_filter(pixels.clamp(0, 1).numpy(), (0, SMOOTHING, SMOOTHING))


def _blobs(mask: np.ndarray, minimum_area: float) -> list[np.ndarray]:
    """Connected areas of a mask, after bridging cracks and dropping rims one or two pixels thin."""
    if mask.sum() < minimum_area:
        return []
    padded = np.pad(mask, 2)
    closed = ndimage.binary_closing(padded, np.ones((3, 3), bool), iterations=2)[2:-2, 2:-2]
    opened = ndimage.binary_opening(np.pad(closed, 1, mode="edge"), np.ones((3, 3), bool))[1:-1, 1:-1]
    labels, count = ndimage.label(opened, np.ones((3, 3), int))
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    return [labels == label for label in range(1, count + 1) if areas[label] >= minimum_area]


def _absorb_rims(blobs: list[tuple[int, np.ndarray]]) -> list[tuple[int, np.ndarray]]:
    """Give each area to a touching one of nearly the same hue and at least twice its size.

    Where a blurred or noisy orange object mixes with the ground, part of it passes for yellow.
    """
    hues = _palette_hues()
    kept: list[tuple[int, np.ndarray]] = []
    for index, mask in sorted(blobs, key=lambda blob: -int(blob[1].sum())):
        similar = [
            position
            for position, (other, area) in enumerate(kept)
            if other != index and _apart(hues[index], hues[other]) < SIMILAR_HUE and area.sum() >= 2 * mask.sum()
        ]
        grown = ndimage.binary_dilation(mask, np.ones((3, 3), bool), iterations=3) if similar else mask
        touching = next((position for position in similar if (grown & kept[position][1]).any()), None)
        if touching is None:
            kept.append((index, mask))
        else:
            kept[touching] = (kept[touching][0], kept[touching][1] | mask)
    return kept


def _apart(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Distance of two angles, 0 to pi."""
    return np.abs((one - other + math.pi) % (2 * math.pi) - math.pi)


def _best_shape(mask: np.ndarray, x: float, y: float, area: float) -> tuple[str, float]:
    """The shape, over all angles, of equal area and centre that has the largest intersection over union."""
    names, templates = _templates()
    steps = np.linspace(-1, 1, _GRID) * math.sqrt(area)
    grid_y, grid_x = np.meshgrid(y + steps, x + steps, indexing="ij")
    seen = ndimage.map_coordinates(mask.astype(np.float32), [grid_y.ravel(), grid_x.ravel()], order=1)
    both = np.minimum(templates, seen).sum(1)
    either = np.maximum(templates, seen).sum(1)
    best = int(np.argmax(both / either))
    return names[best], float(both[best] / either[best])


@functools.cache
def _templates() -> tuple[list[str], np.ndarray]:
    """Every shape at every distinct angle with area 1 on a square grid from -1 to 1: names and ``[K, _GRID^2]``."""
    symmetries = {"circle": 0, "ring": 0, "cross": 4, "triangle": 3, "square": 4, "star": 5}
    y, x = np.meshgrid(np.linspace(-1, 1, _GRID), np.linspace(-1, 1, _GRID), indexing="ij")
    names, templates = [], []
    for shape in SHAPES:
        period = 2 * math.pi / symmetries[shape] if symmetries[shape] else 0.0
        radius = 1 / math.sqrt(_unit_area(shape))
        for angle in np.arange(0.0, max(period, _ANGLE_STEP / 2), _ANGLE_STEP):
            u = (math.cos(angle) * x + math.sin(angle) * y) / radius
            v = (math.cos(angle) * y - math.sin(angle) * x) / radius
            names.append(shape)
            templates.append(inside_shape(shape, u, v).ravel())
    return names, np.array(templates, np.float32)


@functools.cache
def _unit_area(shape: str) -> float:
    """Area of the shape whose circumscribed circle has radius 1."""
    a, b = SHAPES[shape]
    if shape in ("circle", "ring"):
        return math.pi * ((a + b) ** 2 - (a - b) ** 2) if a else math.pi * b**2
    if shape == "cross":
        return 8 * a * b - 4 * b**2
    return a * b * math.sin(math.pi / a)
