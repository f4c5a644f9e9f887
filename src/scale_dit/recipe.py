"""How pictures of one size are made: worked out and checked before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from scale_dit.method import Method, Plan, draft_plan
from scale_dit.models.settings import BaseSettings
from scale_dit.sampling import LowPass, check_sampling, make_scheduler
from scale_dit.wrapping import Shift, check_wrap, wrap_shift


@dataclass(frozen=True)
class Recipe:
    """Plans, schedules and guidance scales of draft and refinement.

    Attributes:
        base: Whose pictures.
        plan, draft_plan: Of the picture and of the draft under it.
        steps, draft_steps: Of the refinement and of the draft.
        guidance_scale, draft_guidance_scale: Of the refinement and of the draft.
        start: Noise level at which refinement starts: 1 is pure noise.
        low_pass: The pull of low frequencies towards the draft.
        wrap: Which edges of the picture join, see `scale_dit.wrapping`.
    """

    base: BaseSettings
    plan: Plan
    draft_plan: Plan
    steps: int
    draft_steps: int
    guidance_scale: float
    draft_guidance_scale: float
    start: float = 1.0
    low_pass: LowPass = field(default_factory=LowPass)
    wrap: str = "none"

    @classmethod
    def of(
        cls,
        base: BaseSettings,
        method: Method,
        height: int,
        width: int,
        *,
        scale: float | None = None,
        steps: int | None = None,
        draft_steps: int | None = None,
        guidance_scale: float | None = None,
        draft_guidance_scale: float | None = None,
        start: float = 1.0,
        low_pass: LowPass | None = None,
        wrap: str = "none",
    ) -> Recipe:
        """The recipe for pictures of `height` x `width` px; `None` is the base's own.

        Args:
            scale: HR side / guidance side; by default what makes the draft as large as the base's native size.

        Raises:
            UserError: Sizes and settings that cannot be.
        """
        check_wrap(wrap)
        check_sampling(base, start, steps, draft_steps, guidance_scale, draft_guidance_scale)
        scale = native_scale(base, height, width) if scale is None else scale
        plan = replace(method, scale=scale).plan(base, height, width)
        return cls(
            base,
            plan,
            draft_plan(base, height, width, scale),
            base.steps if steps is None else steps,
            base.steps if draft_steps is None else draft_steps,
            base.guidance_scale_for(guidance_scale, reads_draft=plan.layout.guidance is not None),
            base.guidance_scale_for(draft_guidance_scale, reads_draft=False),
            start,
            low_pass or LowPass(),
            wrap,
        )

    @property
    def size(self) -> tuple[int, int]:
        """Of the picture, (height, width) in px."""
        return self._pixels(self.plan)

    @property
    def draft_size(self) -> tuple[int, int]:
        """Of its draft, (height, width) in px."""
        return self._pixels(self.draft_plan)

    def _pixels(self, plan: Plan) -> tuple[int, int]:
        grid, token = plan.layout.image, self.base.token_size
        return grid.height * token, grid.width * token

    def shift(self, step: int) -> Shift:
        """How far a step of the refinement sees picture and draft moved."""
        return wrap_shift(self.plan.layout.image, self.plan.layout.guidance, self.wrap, step)

    def draft_shift(self, step: int) -> tuple[int, int]:
        """How far a step of the draft sees it moved, in rows and columns of its tokens."""
        return wrap_shift(self.draft_plan.layout.image, None, self.wrap, step).image

    @property
    def needs_draft(self) -> bool:
        """Whether refinement makes anything of a draft."""
        return self.plan.layout.guidance is not None or self.starts_from_draft

    @property
    def starts_from_draft(self) -> bool:
        """Whether refinement needs the draft at the picture's size."""
        return self.start < 1 or self.low_pass.strength > 0

    @property
    def has_negative_branch(self) -> bool:
        """Whether a stage asks for the second branch of classifier-free guidance."""
        return self.base.has_negative_branch(self.guidance_scale, self.draft_guidance_scale)

    def scheduler(self, device: torch.device, first_step: int = 0) -> FlowMatchEulerDiscreteScheduler:
        """Of the refinement, from a step on."""
        return make_scheduler(self.steps, self.base.shift, self.start, device, first_step)

    def draft_scheduler(self, device: torch.device, first_step: int = 0) -> FlowMatchEulerDiscreteScheduler:
        """Of the draft, from a step on."""
        return make_scheduler(self.draft_steps, self.base.shift, 1.0, device, first_step)


def native_scale(base: BaseSettings, height: int, width: int) -> float:
    """HR side / draft side that makes the draft as large as the base's native size; at least 1."""
    return max(1.0, max(0, height * width) ** 0.5 / base.native)
