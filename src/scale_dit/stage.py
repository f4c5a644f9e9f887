"""One stage of generation, draft or refinement: what is asked of the base at every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from scale_dit.method import Plan
from scale_dit.models.driver import Driver
from scale_dit.models.flux_attention import KeysValues
from scale_dit.models.text import Text
from scale_dit.regions import Region, moved
from scale_dit.sampling import LowPass, denoise, low_pass_guidance

AfterStep = Callable[[int, Tensor, Tensor], Tensor | None]
"""Called after each step with its index, its timestep and the latents `[B, C, h, w]`; may return other latents."""


@dataclass(frozen=True)
class LocalPrompt:
    """Windows that read a text of their own, and how much of it counts, `[rows, columns]` of the region's box."""

    region: Region
    text: Text
    weights: Tensor | None = None


@dataclass(frozen=True)
class Stage:
    """Denoises latents with a base along a plan. Tokens are permuted at the two ends of every step.

    Args:
        text: The prompts.
        negative: The second branch of classifier-free guidance; `None`: there is none.
        guidance_scale: Of classifier-free guidance, or the input of a distilled base.
        keys_values: The draft's keys and values in every block; the same in every step and in both branches.
        pull: The draft at the picture's size, towards which low frequencies are pulled, and how.
        elsewhere: Velocity of what is in none of the regions, `[B, C, h, w]`. `None`: everything is computed.
        regions: What is computed then, each in a pass over its box alone.
        local: Windows with prompts of their own: there, the velocity is that of a pass over their region alone.
        moved: The same stage over a picture and a draft that are moved at a step, what leaves them at one side coming
            back at the other, and how far the picture is: so no edge stays one, and the picture joins itself.
    """

    base: Driver
    plan: Plan
    text: Text
    negative: Text | None
    guidance_scale: float
    keys_values: Sequence[KeysValues] | None = None
    pull: tuple[Tensor, LowPass] | None = None
    elsewhere: Tensor | None = None
    regions: Sequence[Region] = ()
    local: Sequence[LocalPrompt] = ()
    moved: Callable[[int], tuple[Stage, tuple[int, int]]] | None = None

    def sample(
        self, latents: Tensor, scheduler: FlowMatchEulerDiscreteScheduler, after_step: AfterStep | None = None
    ) -> Tensor:
        """Latents `[B, C, h, w]` at the scheduler's first noise level -> clean latents, float32."""
        if self.moved is None:
            return denoise(self.velocity, latents, scheduler, after_step)
        steps = {sigma: index for index, sigma in enumerate(scheduler.sigmas.tolist())}
        grid, moved_stage = self.plan.layout.image, self.moved

        def velocity(latents: Tensor, sigma: float) -> Tensor:
            stage, (rows, columns) = moved_stage(steps[sigma])
            return moved(stage.velocity(moved(latents, grid, (rows, columns)), sigma), grid, (-rows, -columns))

        return denoise(velocity, latents, scheduler, after_step)

    def within(self, region: Region) -> Stage:
        """The stage over a region's box alone; the pull is that of the whole."""
        plan = self.plan.box(region.rows, region.columns)
        return replace(self, plan=plan, pull=None, elsewhere=None, regions=(), local=(), moved=None)

    def velocity(self, latents: Tensor, sigma: float) -> Tensor:
        """Velocity `[B, C, h, w]`, float32, of latents at a noise level."""
        velocity = self._guided(latents, sigma) if self.elsewhere is None else self.elsewhere
        for region in self.regions:
            velocity = self._pasted(velocity, LocalPrompt(region, self.text), latents, sigma)
        for part in self.local:
            velocity = self._pasted(velocity, part, latents, sigma)
        if self.pull is None:
            return velocity
        draft, low_pass = self.pull
        return low_pass_guidance(velocity, latents, draft, sigma, low_pass, self.plan.method.scale)

    def _pasted(self, velocity: Tensor, part: LocalPrompt, latents: Tensor, sigma: float) -> Tensor:
        """A velocity with that of a pass over a region's box in place of the region's."""
        grid, region = self.plan.layout.image, part.region
        inside = replace(self.within(region), text=part.text)
        return region.paste(velocity, inside.velocity(region.crop(latents, grid), sigma), grid, part.weights)

    def _guided(self, latents: Tensor, sigma: float) -> Tensor:
        order, grid = self.plan.layout.image_order, self.plan.layout.image
        tokens = self.base.pack(latents, order)
        velocity = self._branch(tokens, self.text, sigma)
        if self.negative is not None and self.guidance_scale != 1:
            without = self._branch(tokens, self.negative, sigma)
            velocity = without + self.guidance_scale * (velocity - without)
        return self.base.unpack(velocity, order, grid.height, grid.width)

    def _branch(self, tokens: Tensor, text: Text, sigma: float) -> Tensor:
        time = torch.full((len(tokens),), sigma, device=tokens.device)
        return self.base.image_pass(tokens, text, time, self.plan, self.keys_values, self.guidance_scale).float()
