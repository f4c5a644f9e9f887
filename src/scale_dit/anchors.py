"""Rotary positions of image and guidance tokens.

Every family's first three rotary ids of a token are time, row and column (`Driver.token_ids` adds what others it has);
Scale-DiT (arXiv 2510.16325, "scaled positional anchors") spreads the draft's ids over the picture's grid, so that a
guidance token lies where its part of the picture lies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from scale_dit.errors import UserError
from scale_dit.grid import Grid
from scale_dit.layout import Layout

ANCHORS: dict[str, Callable[[float], tuple[float, float]]] = {}
"""Anchor name -> function of one axis' scale s that gives (step, a): token i of the draft sits at `step * i + a`."""


def register(anchor: Callable[[float], tuple[float, float]]) -> Callable[[float], tuple[float, float]]:
    """Offer a function `s -> (step, a)` as the anchor of its own name."""
    ANCHORS[anchor.__name__] = anchor
    return anchor


@register
def scaled(s: float) -> tuple[float, float]:
    """On the first of the picture's tokens under it (the paper)."""
    return s, 0.0


@register
def centred(s: float) -> tuple[float, float]:
    """On the mean position of the picture's tokens under it."""
    return s, (s - 1) / 2


@register
def none(s: float) -> tuple[float, float]:
    """On its own index, as if the draft were the picture's top left corner (ablation)."""
    return 1.0, 0.0


def image_ids(layout: Layout) -> Tensor:
    """Ids (0, row, column) of the image tokens in memory order, float32 `[N, 3]`."""
    return _grid_ids(layout.image, (1.0, 0.0), (1.0, 0.0))[layout.image_order]


def guidance_ids(layout: Layout, anchors: str = "scaled") -> Tensor:
    """Ids (0, s i + a, s j + a) of the guidance tokens in memory order, float32 `[L, 3]`.

    s is the true ratio of the picture's side to the draft's, axis by axis.

    Raises:
        UserError: if the anchor's name is unknown.
    """
    if anchors not in ANCHORS:
        raise UserError(f"Unknown anchors '{anchors}': use one of {', '.join(sorted(ANCHORS))}.")
    if layout.guidance is None:
        return torch.zeros(0, 3)
    anchor = ANCHORS[anchors]
    rows = anchor(layout.image.height / layout.guidance.height)
    columns = anchor(layout.image.width / layout.guidance.width)
    return _grid_ids(layout.guidance, rows, columns)[layout.guidance_order]


def ntk_theta(theta: float, factor: float, axis_dim: int) -> float:
    """Rotary base for a picture `factor` times longer than those of training: theta * factor^(d / (d - 2)).

    "NTK-aware" interpolation (bloc97; YaRN, arXiv 2309.00071, section 3.1): the slowest of the `axis_dim / 2`
    frequencies is divided by `factor` exactly, the fastest is unchanged. A factor of 1 changes nothing.

    Raises:
        UserError: if `factor` is not positive.
    """
    if not factor > 0:
        raise UserError(f"The NTK factor is {factor}, but it must be positive (1: unchanged).")
    return theta * factor ** (axis_dim / (axis_dim - 2))


def yarn_frequencies(
    theta: float, axis_dim: int, factor: float, length: int, slow: float = 1.0, fast: float = 32.0
) -> Tensor:
    """Rotary frequencies of one axis for a picture `factor` times longer than those of training, float64 `[d / 2]`.

    "NTK-by-parts" (YaRN, arXiv 2309.00071, section 3.2, with its alpha and beta): a frequency that turns less than
    `slow` times over the `length` tokens of training is divided by `factor`, one that turns more than `fast` times is
    unchanged, and those between are blended linearly in the number of turns.

    Args:
        length: Tokens a side of the pictures of training.
    """
    plain = theta ** -(torch.arange(0, axis_dim, 2, dtype=torch.float64) / axis_dim)
    turns = length * plain / (2 * math.pi)
    kept = ((turns - slow) / (fast - slow)).clamp(0, 1)
    return (1 - kept) * plain / factor + kept * plain


def yarn_temperature(factor: float) -> float:
    """Factor on rotated queries and keys, sqrt(1/t) = 0.1 ln(s) + 1 (YaRN, arXiv 2309.00071, section 3.4)."""
    return 0.1 * math.log(factor) + 1 if factor > 1 else 1.0


def yarn_rotary(
    ids: Tensor, theta: float, axes: Sequence[int], factors: Sequence[float], length: int
) -> tuple[Tensor, Tensor]:
    """Cosines and sines for ids `[S, axes]`, float32 `[S, D]`, each frequency twice in a row, as diffusers has them.

    Args:
        axes: Dimensions of each axis.
        factors: How many times longer than in training each axis is; 1 leaves it as it is.
        length: Tokens a side of the pictures of training.
    """
    angles = [
        torch.outer(ids[:, axis].double(), yarn_frequencies(theta, dim, factor, length).to(ids.device))
        for axis, (dim, factor) in enumerate(zip(axes, factors, strict=True))
    ]
    joined = torch.cat(angles, dim=1).repeat_interleave(2, dim=1)
    temperature = yarn_temperature(max(factors))
    return (temperature * joined.cos()).float(), (temperature * joined.sin()).float()


def _grid_ids(grid: Grid, rows: tuple[float, float], columns: tuple[float, float]) -> Tensor:
    """Ids of a grid's tokens in raster order, `[tokens, 3]`, from each axis' (step, offset)."""
    ids = torch.zeros(grid.height, grid.width, 3)
    ids[..., 1] += (torch.arange(grid.height) * rows[0] + rows[1])[:, None]
    ids[..., 2] += (torch.arange(grid.width) * columns[0] + columns[1])[None, :]
    return ids.view(-1, 3)
