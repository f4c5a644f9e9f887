"""Random scenes, deterministic from a seed, with disjoint splits."""

from __future__ import annotations

import math
import random

from scale_dit.data.world import COLOURS, GROUNDS, PATTERNS, SHAPES, Scene, SceneObject, world_extent
from scale_dit.errors import UserError

SPLITS = ("train", "validation", "test")
MAXIMUM_ZOOM = 8.0
COUNT_WEIGHTS = (0.3, 0.3, 0.22, 0.18)
SMALLEST_SIZE = 0.14
LARGEST_SIZE = {1: 0.6, 2: 0.52, 3: 0.44, 4: 0.38}
GAP = 0.05
MARGIN = 0.02

_COLOURS, _SHAPES, _GROUNDS = tuple(COLOURS), tuple(SHAPES), tuple(GROUNDS)


def sample_scene(seed: int, split: str = "train", zoom: float | None = None, aspect: float = 1.0) -> Scene:
    """Draw one scene.

    Args:
        seed: Any integer. The same seed, split, zoom and aspect always give the same scene.
        split: One of `SPLITS`; it is hashed into the seed, so splits share no random stream.
        zoom: Fixed zoom (1 shows the whole scene). ``None`` draws it: 1 in half of the scenes, else log-uniform
            between 1 and `MAXIMUM_ZOOM`, mostly where at least part of an object is in view.
        aspect: Width / height of the frame.

    Raises:
        UserError: Unknown split, zoom below 1, or an aspect outside 1/4 to 4.
    """
    if split not in SPLITS:
        raise UserError(f"Unknown split {split!r}: choose one of {', '.join(SPLITS)}.")
    if zoom is not None and not zoom >= 1:
        raise UserError(f"Zoom {zoom} would look beyond the scene: choose 1 (the whole scene) or more.")
    if not 0.25 <= aspect <= 4:
        raise UserError(f"Aspect {aspect} is out of range: choose a width / height between 0.25 and 4.")
    rng = random.Random(f"{split}:{seed}")
    objects = _place_objects(rng, aspect)
    ground = rng.choice(_GROUNDS)
    texture_seed = rng.getrandbits(31)
    if zoom is None:
        zoom = 1.0 if rng.random() < 0.5 else math.exp(rng.random() * math.log(MAXIMUM_ZOOM))
    return Scene(objects, ground, zoom, _aim_camera(rng, objects, zoom, aspect), aspect, texture_seed)


def _place_objects(rng: random.Random, aspect: float) -> tuple[SceneObject, ...]:
    count = rng.choices((1, 2, 3, 4), COUNT_WEIGHTS)[0]
    places = _place_circles(rng, count, aspect)
    distinct = rng.random() < 0.8
    colours = rng.sample(_COLOURS, count) if distinct else rng.choices(_COLOURS, k=count)
    return tuple(
        SceneObject(
            shape=rng.choice(_SHAPES),
            colour=colour,
            pattern=rng.choice(PATTERNS),
            size=size,
            centre=(x, y),
            angle=rng.uniform(-0.35, 0.35),
        )
        for colour, (x, y, size) in zip(colours, places, strict=True)
    )


def _place_circles(rng: random.Random, count: int, aspect: float) -> list[tuple[float, float, float]]:
    """Centres and diameters of circles with a clear gap between them, largest first."""
    width, height = world_extent(aspect)
    largest = LARGEST_SIZE[count]
    while True:
        log_range = math.log(largest / SMALLEST_SIZE)
        sizes = sorted((SMALLEST_SIZE * math.exp(rng.random() * log_range) for _ in range(count)), reverse=True)
        placed: list[tuple[float, float, float]] = []
        for size in sizes:
            border = size / 2 + MARGIN
            for _ in range(20):
                x, y = rng.uniform(border, width - border), rng.uniform(border, height - border)
                if all(math.hypot(x - u, y - v) >= (size + other) / 2 + GAP for u, v, other in placed):
                    placed.append((x, y, size))
                    break
            else:
                break
        if len(placed) == count:
            rng.shuffle(placed)
            return placed
        largest = max(SMALLEST_SIZE * 1.2, largest * 0.93)


def _aim_camera(
    rng: random.Random, objects: tuple[SceneObject, ...], zoom: float, aspect: float
) -> tuple[float, float]:
    """View centre that keeps the visible rectangle inside the world, in most cases on or near an object."""
    extent = world_extent(aspect)
    if rng.random() < 0.85:
        target = rng.choice(objects)
        reach = target.radius + 0.3 / zoom
        angle, distance = rng.uniform(0, 2 * math.pi), reach * math.sqrt(rng.random())
        wanted = (target.centre[0] + distance * math.cos(angle), target.centre[1] + distance * math.sin(angle))
    else:
        wanted = (rng.random() * extent[0], rng.random() * extent[1])
    halves = (extent[0] / zoom / 2, extent[1] / zoom / 2)
    x, y = (min(max(w, half), side - half) for w, half, side in zip(wanted, halves, extent, strict=True))
    return x, y
