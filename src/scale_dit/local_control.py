"""Making parts of a picture anew, and pictures that join themselves at their edges."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from scale_dit.errors import UserError
from scale_dit.grid import Grid
from scale_dit.regions import Region
from scale_dit.sampling import add_noise
from scale_dit.stage import AfterStep, Stage

WRAPS = ("none", "horizontal", "both")


def remake(
    stage: Stage,
    region: Region,
    latents: Tensor,
    begin: Tensor,
    noise: Tensor,
    scheduler: FlowMatchEulerDiscreteScheduler,
    after_step: AfterStep | None = None,
) -> Tensor:
    """Denoise a region's chosen windows anew; all else stays bit by bit.

    What is kept is noised along with them, so that they grow into it: x_t = (1 - t) x_0 + t eps (as in RePaint, Lugmayr
    et al. 2022, with one noise for all levels). Steps cost as much as the region's box has tokens.

    Args:
        stage: Of the whole picture.
        region: What is made anew.
        latents: The finished picture, `[B, C, h, w]`.
        begin: What the chosen windows begin from, noised to the scheduler's first level: the upsampled draft, or the
            finished picture itself. Without effect at level 1.
        noise: `[B, C, h, w]`.

    Returns:
        `[B, C, h, w]` float32.
    """
    grid = stage.plan.layout.image
    kept, fresh, eps = (region.crop(each.float(), grid) for each in (latents, begin, noise))
    sigmas = scheduler.sigmas.tolist()
    chosen = region.mask(kept)

    def hold(index: int, timestep: Tensor, current: Tensor) -> Tensor:
        if after_step is not None and (changed := after_step(index, timestep, current)) is not None:
            current = changed
        return torch.where(chosen, current, add_noise(kept, eps, sigmas[index + 1]))

    first = add_noise(torch.where(chosen, fresh, kept), eps, sigmas[0])
    return region.paste(latents.float(), stage.within(region).sample(first, scheduler, hold), grid)


@dataclass(frozen=True)
class Shift:
    """How far a picture and its draft are moved, in tokens along rows and columns."""

    image: tuple[int, int]
    draft: tuple[int, int]


def wrap_shift(image: Grid, draft: Grid | None, wrap: str) -> Shift:
    """How far every second step sees a picture moved so that it joins itself: about half of it.

    By whole cells of the picture, and by whole tokens of the draft: as far as their sides allow, by the same share.

    Raises:
        UserError: `wrap` is unknown.
    """
    if wrap not in WRAPS:
        raise UserError(f"unknown wrap {wrap!r}: use one of {', '.join(WRAPS)}")
    moved = [
        _half(side, draft_side, image.cell)
        for side, draft_side in zip(
            (image.height, image.width), (draft.height, draft.width) if draft else (1, 1), strict=True
        )
    ]
    wanted = {"none": (0, 0), "horizontal": (0, 1), "both": (1, 1)}[wrap]
    rows, columns = ((move[0] * use, move[1] * use) for move, use in zip(moved, wanted, strict=True))
    return Shift((rows[0], columns[0]), (rows[1], columns[1]))


def _half(side: int, draft_side: int, cell: int) -> tuple[int, int]:
    """Tokens of the picture and of the draft, about half of either, that are most nearly the same share."""

    def error(tokens: int) -> tuple[float, int]:
        share = tokens * draft_side / side
        return abs(share - round(share)), abs(2 * tokens - side)

    nearest = min(range(0, side, cell), key=lambda tokens: abs(2 * tokens - side))
    tokens = min((each for each in range(0, side, cell) if abs(each - nearest) <= side / 8), key=error)
    return tokens, round(tokens * draft_side / side)
