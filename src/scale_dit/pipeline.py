"""`ScaleDiTPipeline`: draft, refine, decode."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from scale_dit.errors import UserError
from scale_dit.grid import Grid
from scale_dit.lora import check_record
from scale_dit.method import Plan, draft_plan
from scale_dit.models.text import Text
from scale_dit.pipeline_loading import LoadedPipeline
from scale_dit.pipeline_output import ScaleDiTOutput, StageCost
from scale_dit.sampling import (
    add_noise,
    check_sampling,
    derived_generators,
    make_scheduler,
    one_generator_each,
    upsample_latents,
)
from scale_dit.stage import AfterStep, Stage

log = logging.getLogger(__name__)

StepEnd = Callable[[Any, int, Tensor, dict[str, Tensor]], Any]
"""diffusers' `callback_on_step_end`."""

Progress = Callable[[str, int, int], None]
"""Called after every step with the stage, the steps done and the steps in all."""


class ScaleDiTPipeline(LoadedPipeline):
    """Large pictures from a base that was trained at a smaller size (Scale-DiT, arXiv 2510.16325).

    >>> pipeline = ScaleDiTPipeline.from_pretrained("assets/tiny-flux")  # doctest: +SKIP
    >>> pipeline.load_lora_weights("assets/tiny-lora")  # doctest: +SKIP
    >>> pipeline("a large red circle on sand", height=1024, width=1024).images[0]  # doctest: +SKIP

    The components are those of the base's stock pipeline, unmodified.
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        height: int | None = None,
        width: int | None = None,
        *,
        negative_prompt: str = "",
        num_inference_steps: int | None = None,
        draft_steps: int | None = None,
        guidance_scale: float | None = None,
        draft_guidance_scale: float | None = None,
        start: float = 1.0,
        low_pass: float = 0.0,
        scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        draft_latents: Tensor | None = None,
        output_type: str = "pil",
        callback_on_step_end: StepEnd | None = None,
        progress: Progress | None = None,
        return_dict: bool = True,
    ) -> ScaleDiTOutput | tuple:
        """Make pictures.

        Args:
            prompt: One or several.
            height, width: In px; by default `scale` times the base's native side.
            negative_prompt: For classifier-free guidance; distilled bases take none.
            num_inference_steps, draft_steps: Steps of the refinement and of the draft.
            guidance_scale, draft_guidance_scale: Of the refinement and of the draft; the base's by default.
            start: Noise level at which refinement starts: 1 is pure noise; below, from the upsampled, noised draft.
            low_pass: Strength of the pull of low frequencies towards the draft; 0 is off.
            scale: HR side / guidance side; by default what makes the draft as large as the base's native size.
            num_images_per_prompt: Pictures of each prompt.
            generator: One, or one a picture; noise is drawn on the generator's device.
            draft_latents: Normalised latents `[B, C, h, w]`, one a picture, to use instead of making drafts.
            output_type: `pil`, `np`, `pt` or `latent`.
            callback_on_step_end: As in diffusers, during refinement: called with the pipeline, the step, its timestep
                and `{"latents": [B, C, h, w]}`; may return other latents under the same name.
            progress: Called after each step of any stage.

        Raises:
            UserError: No prompt, or sizes and settings that cannot be; before anything is computed.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise UserError("the list of prompts is empty: give at least one prompt")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise UserError(f"unknown output_type {output_type!r}: use one of pil, np, pt, latent")
        if num_images_per_prompt < 1:
            raise UserError(f"num_images_per_prompt is {num_images_per_prompt}, but it must be at least 1")
        settings = self.settings
        check_sampling(settings, start, num_inference_steps, draft_steps, guidance_scale, draft_guidance_scale)
        prompts = [text for text in prompts for _ in range(num_images_per_prompt)]
        side = round(settings.native * (self.method.scale if scale is None else scale))
        height, width = (side if given is None else given for given in (height, width))
        Grid.from_pixels(height, width, settings.token_size, settings.cell)  # says what cannot be
        scale = max(1.0, (height * width) ** 0.5 / settings.native) if scale is None else scale
        if self.lora_record:
            for difference in check_record(self.lora_record, settings.name, {"scale": scale}):
                log.warning("%s", difference)
        plan = replace(self.method, scale=scale).plan(settings, height, width)
        draft_plan = self.draft_plan(height, width, scale)
        draft_scheduler, refine_scheduler = self._scheduler(draft_steps), self._scheduler(num_inference_steps, start)
        if draft_latents is not None:
            draft_latents = self._checked_drafts(draft_latents, len(prompts))
        generators = one_generator_each(generator, len(prompts))
        refine_generators = derived_generators(generators)
        cost = StageCost()

        with cost.stage("text", self._execution_device):
            text = self.base.encode_prompts(prompts)
            negative = self._encode_negative(
                negative_prompt, len(prompts),
                self._scale(guidance_scale, plan), self._scale(draft_guidance_scale, draft_plan),
            )  # fmt: skip
        with cost.stage("draft", self._execution_device):
            needs_draft = plan.layout.guidance is not None or start < 1 or low_pass > 0
            if draft_latents is None and needs_draft:
                draft_latents = self.draft(
                    text, negative, draft_plan, draft_scheduler, draft_guidance_scale, generators, progress
                )
        with cost.stage("refine", self._execution_device):
            latents = self.refine(
                text, negative, plan, draft_latents, refine_scheduler, guidance_scale, refine_generators,
                start=start, low_pass=low_pass, callback=callback_on_step_end, progress=progress,
            )  # fmt: skip
        with cost.stage("decode", self._execution_device):
            images: Any = latents if output_type == "latent" else self.decode(latents)
        if output_type in ("pil", "np"):
            array = images.permute(0, 2, 3, 1).float().cpu().numpy()
            images = self.numpy_to_pil(array) if output_type == "pil" else array
        self.maybe_free_model_hooks()
        if not return_dict:
            return images, draft_latents, cost
        return ScaleDiTOutput(images, draft_latents, cost)

    @torch.no_grad()
    def make_drafts(
        self,
        prompts: Sequence[str],
        height: int,
        width: int,
        scale: float,
        steps: int | None,
        guidance_scale: float | None,
        generators: Sequence[torch.Generator],
    ) -> tuple[Tensor, StageCost]:
        """The drafts that a call with these arguments would make, and what they cost."""
        cost = StageCost()
        with cost.stage("text", self._execution_device):
            text = self.base.encode_prompts(prompts)
            plan = self.draft_plan(height, width, scale)
            negative = self._encode_negative("", len(prompts), self._scale(guidance_scale, plan))
        with cost.stage("draft", self._execution_device):
            latents = self.draft(text, negative, plan, self._scheduler(steps), guidance_scale, generators)
        return latents, cost

    def draft_plan(self, height: int, width: int, scale: float) -> Plan:
        """The plan of the draft under a picture: one window, nothing to read but text and itself."""
        return draft_plan(self.settings, height, width, scale)

    def draft(
        self,
        text: Text,
        negative: Text | None,
        plan: Plan,
        scheduler: Any,
        guidance_scale: float | None,
        generators: Sequence[torch.Generator],
        progress: Progress | None = None,
    ) -> Tensor:
        """Make the drafts.

        Returns:
            Normalised latents `[B, C, h, w]` float32.
        """
        stage = Stage(self.base, plan, text, negative, self._scale(guidance_scale, plan))
        return stage.sample(
            self._noise(plan, generators), scheduler, self._after_step("draft", scheduler, progress, None)
        )

    def refine(
        self,
        text: Text,
        negative: Text | None,
        plan: Plan,
        draft_latents: Tensor | None,
        scheduler: Any,
        guidance_scale: float | None,
        generators: Sequence[torch.Generator],
        *,
        start: float = 1.0,
        low_pass: float = 0.0,
        callback: StepEnd | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Denoise the large picture, which reads the draft.

        Returns:
            Normalised latents `[B, C, h, w]` float32.
        """
        latents = self._noise(plan, generators)
        upsampled = None
        if draft_latents is not None and (start < 1 or low_pass > 0):
            upsampled = upsample_latents(draft_latents, *latents.shape[-2:])
            latents = add_noise(upsampled, latents, start)
        keys_values, guidance_scale = None, self._scale(guidance_scale, plan)
        if plan.layout.guidance is not None:
            assert draft_latents is not None
            tokens = self.base.pack(self._guidance_latents(draft_latents, plan), plan.layout.guidance_order)
            keys_values = self.base.guidance_pass(tokens, text.pooled, plan, guidance_scale)
        pull = (upsampled, low_pass) if upsampled is not None and low_pass > 0 else None
        stage = Stage(self.base, plan, text, negative, guidance_scale, keys_values, pull)
        return stage.sample(latents, scheduler, self._after_step("refine", scheduler, progress, callback))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents `[B, C, h, w]` -> pictures `[B, 3, 8h, 8w]` in [0, 1], in the way that `decoding` says."""
        return torch.cat([self.base.decode_latents(one[None], self.decoding).cpu() for one in latents])

    def _guidance_latents(self, draft_latents: Tensor, plan: Plan) -> Tensor:
        """The draft at the size that the plan reads: as it is, or reduced as a picture and encoded again."""
        guidance = plan.layout.guidance
        assert guidance is not None
        if tuple(draft_latents.shape[-2:]) == (2 * guidance.height, 2 * guidance.width):
            return draft_latents
        token = self.settings.token_size
        size = (guidance.height * token, guidance.width * token)
        pictures = torch.nn.functional.interpolate(
            self.base.decode_latents(draft_latents), size=size, mode="bicubic", antialias=True
        )
        return self.base.encode_images(pictures.clamp(0, 1))

    def _noise(self, plan: Plan, generators: Sequence[torch.Generator]) -> Tensor:
        grid = plan.layout.image
        noise = [self.base.noise(grid.height, grid.width, each) for each in generators]
        return torch.cat([one.to(self._execution_device) for one in noise])

    def _scale(self, guidance_scale: float | None, plan: Plan) -> float:
        return self.settings.guidance_scale_for(guidance_scale, plan.layout.guidance is not None)

    def _scheduler(self, steps: int | None, start: float = 1.0) -> Any:
        steps = self.settings.steps if steps is None else steps
        return make_scheduler(steps, self.settings.shift, start, self._execution_device)

    def _encode_negative(self, prompt: str, count: int, *guidance_scales: float) -> Text | None:
        """The text of the second branch of classifier-free guidance, if any stage evaluates it."""
        if not self.settings.has_negative_branch(*guidance_scales):
            return None
        return self.base.encode_prompts([prompt] * count)

    def _checked_drafts(self, draft_latents: Tensor, count: int) -> Tensor:
        shape, channels = tuple(draft_latents.shape), self.base.latent_channels
        if len(shape) != 4 or shape[:2] != (count, channels):
            raise UserError(
                f"draft_latents have the shape {list(shape)}, but {count} pictures need [{count}, {channels}, h, w]"
            )
        return draft_latents.to(self._execution_device, torch.float32)

    def _after_step(
        self, stage: str, scheduler: Any, progress: Progress | None, callback: StepEnd | None
    ) -> AfterStep | None:
        if progress is None and callback is None:
            return None
        steps = len(scheduler.timesteps)

        def after_step(index: int, timestep: Tensor, latents: Tensor) -> Tensor | None:
            if progress is not None:
                progress(stage, index + 1, steps)
            if callback is None:
                return None
            return (callback(self, index, timestep, {"latents": latents}) or {}).get("latents")

        return after_step
