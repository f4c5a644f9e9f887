"""Procedural scenes: describe, sample, render, and say what is visible.

>>> from scale_dit.data.scenes import render, sample_scene
>>> pictures = render([sample_scene(seed) for seed in range(4)], 256, 256)
>>> pictures.shape
torch.Size([4, 3, 256, 256])
"""

from __future__ import annotations

from scale_dit.data.render import pack, render, render_packed
from scale_dit.data.scene_sampling import MAXIMUM_ZOOM, SPLITS, sample_scene
from scale_dit.data.visibility import VisibleObject, visible_objects
from scale_dit.data.world import COLOURS, GROUNDS, PATTERNS, SHAPES, Ground, Scene, SceneObject, world_extent

__all__ = [
    "COLOURS",
    "GROUNDS",
    "MAXIMUM_ZOOM",
    "PATTERNS",
    "SHAPES",
    "SPLITS",
    "Ground",
    "Scene",
    "SceneObject",
    "VisibleObject",
    "pack",
    "render",
    "render_packed",
    "sample_scene",
    "visible_objects",
    "world_extent",
]
