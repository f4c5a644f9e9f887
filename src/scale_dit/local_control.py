"""Making parts of a picture: windows that are made anew, and windows that read a prompt of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from scale_dit.grid import Grid
from scale_dit.layout import Layout
from scale_dit.models.text import Text
from scale_dit.regions import Box, Region, blending, moved, regions_around, tokens_of_boxes, whole_windows
from scale_dit.sampling import add_noise
from scale_dit.stage import AfterStep, LocalPrompt, Stage


@dataclass(frozen=True)
class WindowPrompt:
    """A prompt for all windows that a box, in px, touches."""

    box: Box
    prompt: str

    def tokens(self, grid: Grid, token_size: int) -> Tensor:
        """Tokens in the box, bool `[height, width]`.

        Raises:
            UserError: The box is empty or leaves the picture.
        """
        return tokens_of_boxes([self.box], grid, token_size)


@dataclass(frozen=True)
class WindowText:
    """An encoded prompt for all windows that hold one of the touched tokens, bool `[height, width]`."""

    touched: Tensor
    text: Text


def local_prompts(
    texts: Sequence[WindowText], layout: Layout, shift: tuple[int, int] = (0, 0), wrap: str = "none"
) -> list[LocalPrompt]:
    """What a stage reads where, its picture moved by `shift` rows and columns of tokens.

    Of windows with several texts, the last one counts. Texts change over one cell.
    """
    found = []
    for each in texts:
        chosen = whole_windows(each.touched, layout)
        weights = blending(chosen, layout.image.cell, wrap).roll(shift, (0, 1))
        for region in regions_around(layout, chosen.roll(shift, (0, 1))):
            inside = region.crop(weights, layout.image) * region.chosen
            found.append(LocalPrompt(region, each.text, inside))
    return found


def remake(
    stage: Stage,
    chosen: Tensor,
    finished: Tensor,
    noise: Tensor,
    scheduler: FlowMatchEulerDiscreteScheduler,
    after_step: AfterStep | None = None,
    *,
    latents: Tensor | None = None,
) -> Tensor:
    """Denoise chosen tokens of a finished picture anew; all else stays bit by bit.

    What is kept is noised along with them, so that they grow into it: x_t = (1 - t) x_0 + t eps (as in RePaint, Lugmayr
    et al. 2022, with one noise for all levels). A step costs as much as the boxes around the tokens have tokens.

    Args:
        stage: Of the whole picture.
        chosen: Bool `[height, width]`, in tokens.
        finished: The picture, `[B, C, h, w]`.
        noise: `[B, C, h, w]`.
        latents: What steps before the scheduler's first led to; by default nothing went before, and the picture is
            noised to the first level.

    Returns:
        `[B, C, h, w]` float32.
    """
    finished, sigmas = finished.float(), scheduler.sigmas.tolist()
    changes = _everything(stage.plan.layout, chosen).mask(finished)

    def hold(index: int, timestep: Tensor, current: Tensor) -> Tensor:
        kept = add_noise(finished, noise, sigmas[index + 1])
        held = torch.where(changes, current, kept)
        changed = after_step(index, timestep, held) if after_step is not None else None
        return held if changed is None else torch.where(changes, changed, kept)

    first = add_noise(finished, noise, sigmas[0]) if latents is None else latents
    return _limited(stage, chosen, noise - finished).sample(first, scheduler, hold)


def _everything(layout: Layout, chosen: Tensor) -> Region:
    """The whole picture as a region of which some tokens are chosen."""
    return Region(range(layout.image.height), range(layout.image.width), chosen)


def _limited(stage: Stage, chosen: Tensor, elsewhere: Tensor) -> Stage:
    """The stage over chosen tokens, bool `[height, width]`, alone; `elsewhere` is the velocity of all else."""
    layout = stage.plan.layout

    def limited_prompts(part: LocalPrompt) -> list[LocalPrompt]:
        everywhere = part.region.chosen if part.weights is None else part.weights
        weights = part.region.paste(torch.zeros(chosen.shape), everywhere.float(), layout.image) * chosen
        return [
            LocalPrompt(region, part.text, region.crop(weights, layout.image))
            for region in regions_around(layout, weights > 0)
        ]

    def limited_at(step: int) -> tuple[Stage, tuple[int, int]]:
        assert stage.moved is not None
        there, shift = stage.moved(step)
        return _limited(there, chosen.roll(shift, (0, 1)), moved(elsewhere, layout.image, shift)), shift

    return replace(
        stage,
        regions=regions_around(layout, chosen),
        elsewhere=elsewhere,
        local=[limited for part in stage.local for limited in limited_prompts(part)],
        moved=None if stage.moved is None else limited_at,
    )
