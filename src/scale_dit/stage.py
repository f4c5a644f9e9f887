"""One stage of generation, draft or refinement: what is asked of the base at every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from scale_dit.method import Plan
from scale_dit.models.flux1 import Flux1, Text
from scale_dit.models.flux_attention import KeysValues
from scale_dit.sampling import denoise, low_pass_guidance

AfterStep = Callable[[int, Tensor, Tensor], Tensor | None]
"""Called after each step with its index, its timestep and the latents `[B, C, h, w]`; may return other latents."""


@dataclass(frozen=True)
class Stage:
    """Denoises latents with a base along a plan. Tokens are permuted once, at the two ends.

    Args:
        text: The prompts.
        negative: The second branch of classifier-free guidance; `None`: there is none.
        guidance_scale: Of classifier-free guidance, or the input of a distilled base.
        keys_values: The draft's keys and values in every block; the same in every step and in both branches.
        pull: The draft at the picture's size, towards which low frequencies are pulled, and how strongly.
    """

    base: Flux1
    plan: Plan
    text: Text
    negative: Text | None
    guidance_scale: float
    keys_values: Sequence[KeysValues] | None = None
    pull: tuple[Tensor, float] | None = None

    def sample(
        self, latents: Tensor, scheduler: FlowMatchEulerDiscreteScheduler, after_step: AfterStep | None = None
    ) -> Tensor:
        """Latents `[B, C, h, w]` at the scheduler's first noise level -> clean latents, float32."""

        def after(index: int, timestep: Tensor, tokens: Tensor) -> Tensor | None:
            changed = after_step(index, timestep, self._unpack(tokens)) if after_step is not None else None
            return None if changed is None else self._pack(changed.float())

        return self._unpack(denoise(self._velocity, self._pack(latents), scheduler, after))

    def _velocity(self, tokens: Tensor, sigma: float) -> Tensor:
        velocity = self._branch(tokens, self.text, sigma)
        if self.negative is not None and self.guidance_scale != 1:
            without = self._branch(tokens, self.negative, sigma)
            velocity = without + self.guidance_scale * (velocity - without)
        if self.pull is None:
            return velocity
        draft, strength = self.pull
        pulled = low_pass_guidance(
            self._unpack(velocity), self._unpack(tokens), draft, sigma, strength, self.plan.method.scale
        )
        return self._pack(pulled)

    def _branch(self, tokens: Tensor, text: Text, sigma: float) -> Tensor:
        time = torch.full((len(tokens),), sigma, device=tokens.device)
        return self.base.image_pass(tokens, text, time, self.plan, self.keys_values, self.guidance_scale).float()

    def _pack(self, latents: Tensor) -> Tensor:
        return self.base.pack(latents, self.plan.layout.image_order)

    def _unpack(self, tokens: Tensor) -> Tensor:
        grid = self.plan.layout.image
        return self.base.unpack(tokens, self.plan.layout.image_order, grid.height, grid.width)
