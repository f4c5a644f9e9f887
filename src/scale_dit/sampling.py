"""Flow-matching sampling: the schedule with a constant shift, the Euler loop, and low-pass guidance."""

from __future__ import annotations

import logging
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from scale_dit.errors import UserError
from scale_dit.models.settings import BaseSettings, check_guidance_scale
from scale_dit.models.weights_folder import has_guidance_input

log = logging.getLogger(__name__)

Velocity = Callable[[Tensor, float], Tensor]
"""Function of the latents and the noise level sigma that gives the velocity eps - x_0."""

StepCallback = Callable[[int, Tensor, Tensor], Tensor | None]
"""Called after each step with its index, its timestep, and the latents; may return other latents to go on with."""


def make_scheduler(
    steps: int, shift: float, start: float, device: torch.device, first_step: int = 0
) -> FlowMatchEulerDiscreteScheduler:
    """A scheduler over `steps` noise levels from `start` down to 0; sampling begins at the step `first_step`.

    Levels are evenly spaced before the shift sigma = shift u / (1 + (shift - 1) u) (Esser et al. 2024, eq. 23), and the
    shift is constant: diffusers' shift that grows with the picture leaves nearly all levels above 0.9 at 65,536 tokens.

    Raises:
        UserError: Fewer than one step, a start outside (0, 1], a shift that is not positive, or a first step beyond the
            last.
    """
    if steps < 1:
        raise UserError(f"the number of steps is {steps}, but it must be at least 1")
    if not 0 < start <= 1:
        raise UserError(f"start is {start}, but it must be above 0 and at most 1 (1: pure noise)")
    if not shift > 0:
        raise UserError(f"shift is {shift}, but it must be positive (1: unshifted)")
    if not 0 <= first_step <= steps:
        raise UserError(f"the first step is {first_step}, but it must be from 0 to {steps}, the number of steps")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    first = start / (shift - (shift - 1) * start)
    levels = torch.linspace(first, first / steps, steps, dtype=torch.float64)
    scheduler.set_timesteps(sigmas=levels.tolist(), device=device)
    scheduler.set_begin_index(first_step)
    return scheduler


def check_sampling(
    base: BaseSettings,
    start: float,
    steps: int | None,
    draft_steps: int | None,
    guidance_scale: float | None,
    draft_guidance_scale: float | None,
) -> None:
    """Refuse what sampling would refuse, before anything is computed; `None` is the base's own.

    Raises:
        UserError: Steps, a start or a guidance scale that cannot be.
    """
    for count, first in ((steps, start), (draft_steps, 1.0)):
        make_scheduler(base.steps if count is None else count, base.shift, first, torch.device("cpu"))
    for name, value in (("guidance_scale", guidance_scale), ("draft_guidance_scale", draft_guidance_scale)):
        if value is not None:
            check_guidance_scale(name, value)


def warn_of_unread_scales(
    base: BaseSettings, config: dict[str, Any], guidance_scale: float | None, draft_guidance_scale: float | None = None
) -> None:
    """Say so if guidance scales are given that nothing reads.

    Args:
        config: The transformer's.
    """
    given = {"guidance_scale": guidance_scale, "draft_guidance_scale": draft_guidance_scale}
    named = [f"{name}={value:g}" for name, value in given.items() if value is not None and value != base.guidance_scale]
    if named and base.distilled and not has_guidance_input(config):
        log.warning(
            "nothing reads %s: base %s is distilled to few steps without guidance; choose one that has guidance, such "
            "as base=flux1_dev or base=klein_base_4b",
            " and ".join(named), base.name,
        )  # fmt: skip


def training_levels(
    count: int, shift: float, device: torch.device, generator: torch.Generator | None = None, spread: float = 1.0
) -> Tensor:
    """Noise levels `[count]` to train at: sigmoid(normal) (Esser et al. 2024, section 3.1), shifted as in sampling.

    `spread` is the normal's standard deviation; from 1.6 on, levels near 0 and 1 are about as frequent as others.
    """
    levels = torch.sigmoid(spread * torch.randn(count, generator=generator, device=device))
    return shift * levels / (1 + (shift - 1) * levels)


def denoise(
    velocity: Velocity,
    latents: Tensor,
    scheduler: FlowMatchEulerDiscreteScheduler,
    callback: StepCallback | None = None,
) -> Tensor:
    """Integrate the velocity from the noise level at which the scheduler begins to 0, in float32.

    Args:
        latents: Noisy latents or tokens of any shape, at that noise level.
    """
    latents = latents.float()
    sigmas = scheduler.sigmas.tolist()
    for index in range(scheduler.begin_index or 0, len(scheduler.timesteps)):
        timestep = scheduler.timesteps[index]
        prediction = velocity(latents, sigmas[index]).float()
        latents = scheduler.step(prediction, timestep, latents, return_dict=False)[0]
        changed = callback(index, timestep, latents) if callback is not None else None
        latents = latents if changed is None else changed
    return latents


def add_noise(clean: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
    """x_t = (1 - t) x_0 + t eps, at t = `sigma`, a number or one for each sample."""
    return (1 - sigma) * clean + sigma * noise


def low_pass(latents: Tensor, scale: float) -> Tensor:
    """The part of latents `[B, C, h, w]` that a grid `scale` times coarser can carry."""
    height, width = latents.shape[-2:]
    coarse = (max(1, round(height / scale)), max(1, round(width / scale)))
    small = torch.nn.functional.interpolate(latents, size=coarse, mode="area")
    return torch.nn.functional.interpolate(small, size=(height, width), mode="bicubic")


LOW_PASS_SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda sigma: (1 - math.cos(math.pi * sigma)) / 2,
    "linear": lambda sigma: sigma,
    "constant": lambda sigma: 1.0,
}
"""How the pull towards the draft goes with the noise level, from 1 at pure noise."""


@dataclass(frozen=True)
class LowPass:
    """The pull of low frequencies towards the draft.

    Args:
        strength: At pure noise, from 0 (off) to 1 (all of it).
        schedule: How it goes with the noise level: `cosine`, `linear` or `constant`.
        until: Noise level below which there is none, so that late steps are free.

    Raises:
        UserError: Values that cannot be.
    """

    strength: float = 0.0
    schedule: str = "cosine"
    until: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise UserError(f"low_pass is {self.strength}, but it must be from 0 (off) to 1 (all low frequencies)")
        if self.schedule not in LOW_PASS_SCHEDULES:
            raise UserError(
                f"unknown low_pass_schedule {self.schedule!r}: use one of {', '.join(sorted(LOW_PASS_SCHEDULES))}"
            )
        if not 0 <= self.until <= 1:
            raise UserError(f"low_pass_until is {self.until}, but noise levels go from 0 to 1")

    def weight(self, sigma: float) -> float:
        """The pull at a noise level."""
        return self.strength * LOW_PASS_SCHEDULES[self.schedule](sigma) if sigma >= self.until else 0.0


def low_pass_guidance(
    velocity: Tensor, latents: Tensor, draft: Tensor, sigma: float, pull: LowPass, scale: float
) -> Tensor:
    """Pull the low frequencies of a velocity towards the one that leads to the draft.

    The draft as x_0 would need the velocity (x_t - draft) / t. All tensors `[B, C, h, w]`, the draft already at the
    picture's size.
    """
    weight = pull.weight(sigma)
    if weight == 0:
        return velocity
    towards_draft = (latents - draft) / sigma
    return velocity + weight * low_pass(towards_draft - velocity, scale)


def upsample_latents(latents: Tensor, height: int, width: int) -> Tensor:
    """Bicubic upsampling of latents `[B, C, h, w]` to `[B, C, height, width]`."""
    return torch.nn.functional.interpolate(latents.float(), size=(height, width), mode="bicubic")


def one_generator_each(
    generator: torch.Generator | Sequence[torch.Generator] | None, count: int
) -> list[torch.Generator]:
    """One generator a picture; a single one is shared, none is a fresh one with a random seed.

    Raises:
        UserError: As many generators as pictures were not given.
    """
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    if isinstance(generator, torch.Generator):
        return [generator] * count
    if len(generator) != count:
        raise UserError(f"{len(generator)} generators were given for {count} pictures: give one, or one a picture")
    return list(generator)


def derived_generators(generators: list[torch.Generator]) -> list[torch.Generator]:
    """Generators for the refinement, seeded by the state of those for the draft.

    So the draft is the picture that the stock pipeline makes from the same generator with the base's constant shift,
    and the refinement's noise is the same whether a draft was made or given.
    """
    derived: dict[int, torch.Generator] = {}
    for each in generators:
        if id(each) not in derived:
            seed = zlib.crc32(each.get_state().numpy().tobytes())
            derived[id(each)] = torch.Generator(each.device).manual_seed(seed)
    return [derived[id(each)] for each in generators]
