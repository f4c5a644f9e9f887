"""The world of the procedural scenes: its vocabulary and the description of one scene.

World coordinates: x to the right, y downwards, the shorter side of the whole scene is 1. A scene of aspect ``a``
(width / height) therefore covers ``[0, max(1, a)] x [0, max(1, 1 / a)]``. A camera shows a rectangle of it. Angles are
in radians, clockwise in the picture (y points down).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# Object colours: saturated, hues at least 28 degrees apart. The second tone of a pattern has the same hue, darker for
# bright colours and lighter for dark ones, so that a patterned object stays one blob of one hue.
COLOURS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "red": ((0.88, 0.10, 0.12), (0.54, 0.06, 0.07)),
    "orange": ((0.98, 0.52, 0.06), (0.66, 0.35, 0.04)),
    "yellow": ((0.96, 0.90, 0.12), (0.66, 0.62, 0.08)),
    "green": ((0.10, 0.72, 0.16), (0.05, 0.44, 0.09)),
    "cyan": ((0.08, 0.84, 0.86), (0.04, 0.54, 0.55)),
    "blue": ((0.10, 0.26, 0.88), (0.42, 0.54, 0.97)),
    "purple": ((0.50, 0.10, 0.80), (0.73, 0.45, 0.94)),
    "pink": ((0.97, 0.22, 0.74), (0.65, 0.12, 0.49)),
}

# Outlines with circumscribed radius 1, see `render.signed_distance`. Circle and ring: radius of the centre line and
# half width; cross: length and half width of an arm; polygons and stars: number of tips, radius of the corners between.
SHAPES: dict[str, tuple[float, float]] = {
    "circle": (0.0, 1.0),
    "ring": (0.76, 0.24),
    "cross": (math.sqrt(1 - 0.33**2), 0.33),
    "triangle": (3.0, math.cos(math.pi / 3)),
    "square": (4.0, math.cos(math.pi / 4)),
    "star": (5.0, 0.46),
}

PATTERNS: tuple[str, ...] = ("plain", "striped", "dotted", "checkered")


@dataclass(frozen=True)
class Ground:
    """How one kind of ground looks. Lengths are in world units (shorter side of the whole scene = 1).

    Attributes:
        phrases: How captions name it.
        colour: Mean RGB.
        light: RGB direction that texture noise moves along.
        noise: Noise amplitude of the octave as large as the frame, and how it changes per octave towards finer ones.
        stretch: How much longer noise is along x and along y.
        cell: Width and height of bricks, boards or tiles; 0 for none.
        shift: Horizontal offset from one row of cells to the next, in cells.
        joint: Half width of the joint between cells.
        joint_colour: RGB of the joint.
        tint: Brightness difference between cells.
        wave: Amplitude, cycles along x, cycles along y and bending of ripples or weave.
    """

    phrases: tuple[str, ...]
    colour: tuple[float, float, float]
    light: tuple[float, float, float]
    noise: tuple[float, float] = (0.09, 0.92)
    stretch: tuple[float, float] = (1.0, 1.0)
    cell: tuple[float, float] = (0.0, 0.0)
    shift: float = 0.0
    joint: float = 0.0
    joint_colour: tuple[float, float, float] = (0.0, 0.0, 0.0)
    tint: float = 0.0
    wave: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)


# Muted everywhere (chroma below 0.2), so that no object colour occurs in a ground.
GROUNDS: dict[str, Ground] = {
    "brick": Ground(
        ("a brick wall", "bricks"),
        (0.56, 0.46, 0.42),
        (0.9, 0.8, 0.7),
        cell=(0.25, 0.1),
        shift=0.5,
        joint=0.006,
        joint_colour=(0.74, 0.73, 0.70),
        tint=0.07,
    ),
    "wood": Ground(
        ("wooden boards", "a wooden floor"),
        (0.57, 0.51, 0.44),
        (0.95, 0.9, 0.82),
        (0.12, 0.90),
        (8.0, 1.0),
        cell=(1.1, 0.19),
        shift=0.37,
        joint=0.003,
        joint_colour=(0.24, 0.20, 0.17),
        tint=0.06,
    ),
    "sand": Ground(
        ("sand", "sandy ground"),
        (0.72, 0.67, 0.57),
        (0.9, 0.85, 0.75),
        (0.07, 0.95),
        wave=(0.03, 0.0, 13.0, 1.6),
    ),
    "stone": Ground(("stone", "grey stone"), (0.52, 0.53, 0.55), (0.9, 0.9, 0.92), (0.12, 0.90)),
    "grass": Ground(
        ("grass", "a lawn"),
        (0.42, 0.49, 0.36),
        (0.85, 0.92, 0.75),
        (0.10, 0.92),
        (1.0, 4.0),
    ),
    "sky": Ground(
        ("a cloudy sky", "the sky"),
        (0.66, 0.72, 0.78),
        (0.95, 0.87, 0.8),
        (0.34, 0.72),
        (1.8, 1.0),
    ),
    "tiles": Ground(
        ("tiles", "a tiled floor"),
        (0.76, 0.77, 0.76),
        (0.8, 0.8, 0.8),
        (0.06, 0.96),
        cell=(0.2, 0.2),
        joint=0.005,
        joint_colour=(0.47, 0.47, 0.46),
        tint=0.05,
    ),
    "fabric": Ground(
        ("fabric", "woven fabric"),
        (0.47, 0.43, 0.50),
        (0.85, 0.8, 0.9),
        (0.06, 0.96),
        wave=(0.07, 24.0, 24.0, 0.0),
    ),
}


@dataclass(frozen=True)
class SceneObject:
    """One object: names from `SHAPES`, `COLOURS`, `PATTERNS`; diameter of its circumscribed circle; centre; angle."""

    shape: str
    colour: str
    pattern: str
    size: float
    centre: tuple[float, float]
    angle: float

    @property
    def radius(self) -> float:
        """Radius of the circumscribed circle, in world units."""
        return self.size / 2


@dataclass(frozen=True)
class Scene:
    """A whole picture in continuous coordinates: objects on a ground, seen by a camera.

    Attributes:
        objects: One to four objects that do not overlap.
        ground: A name from `GROUNDS`.
        zoom: The camera shows ``1 / zoom`` of the whole scene's width and height.
        view_centre: Centre of the visible rectangle, in world coordinates.
        aspect: Width / height of the frame and of the whole scene.
        seed: Seed of every texture.
    """

    objects: tuple[SceneObject, ...]
    ground: str
    zoom: float
    view_centre: tuple[float, float]
    aspect: float
    seed: int

    @property
    def extent(self) -> tuple[float, float]:
        """Width and height of the whole scene, in world units."""
        return world_extent(self.aspect)

    @property
    def view(self) -> tuple[float, float, float, float]:
        """Left, top, width and height of the visible rectangle, in world units."""
        width, height = (side / self.zoom for side in self.extent)
        return self.view_centre[0] - width / 2, self.view_centre[1] - height / 2, width, height


def world_extent(aspect: float) -> tuple[float, float]:
    """Width and height of a whole scene whose shorter side is 1."""
    return max(1.0, aspect), max(1.0, 1.0 / aspect)
