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
from scale_dit.local_control import WindowPrompt
from scale_dit.lora import check_record
from scale_dit.pipeline_output import ScaleDiTOutput, StageCost
from scale_dit.pipeline_stages import StagedPipeline
from scale_dit.recipe import Recipe
from scale_dit.sampling import LowPass, derived_generators, one_generator_each, warn_of_unread_scales
from scale_dit.stage import AfterStep

log = logging.getLogger(__name__)

StepEnd = Callable[[Any, int, Tensor, dict[str, Tensor]], Any]
"""diffusers' `callback_on_step_end`."""

Progress = Callable[[str, int, int], None]
"""Called after every step with the stage, the steps done and the steps in all."""


class ScaleDiTPipeline(StagedPipeline):
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
        low_pass_schedule: str = "cosine",
        low_pass_until: float = 0.0,
        scale: float | None = None,
        window_prompts: Sequence[WindowPrompt] = (),
        wrap: str = "none",
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
            low_pass, low_pass_schedule, low_pass_until: The pull of low frequencies towards the draft, see `LowPass`; 0
                is off.
            scale: HR side / guidance side; by default what makes the draft as large as the base's native size.
            window_prompts: What windows of the large picture show instead, under the draft of `prompt`.
            wrap: Which edges join, so that a picture can be laid beside itself: `none`, `horizontal` (panoramas of 360
                degrees) or `both` (textures).
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
        prompts = [text for text in prompts for _ in range(num_images_per_prompt)]
        side = round(settings.native * (self.method.scale if scale is None else scale))
        height, width = (side if given is None else given for given in (height, width))
        Grid.from_pixels(height, width, settings.token_size, settings.cell)  # says what cannot be
        recipe = Recipe.of(
            settings, self.method, height, width, scale=scale, steps=num_inference_steps, draft_steps=draft_steps,
            guidance_scale=guidance_scale, draft_guidance_scale=draft_guidance_scale, start=start,
            low_pass=LowPass(low_pass, low_pass_schedule, low_pass_until), wrap=wrap,
        )  # fmt: skip
        _ = replace(self.decoding, wrap=wrap)  # says what cannot be
        warn_of_unread_scales(settings, dict(self.transformer.config), guidance_scale, draft_guidance_scale)
        if self.lora_record:
            for difference in check_record(self.lora_record, settings.name, {"scale": recipe.plan.method.scale}):
                log.warning("%s", difference)
        if draft_latents is not None:
            draft_latents = self._checked_drafts(draft_latents, len(prompts))
        generators = one_generator_each(generator, len(prompts))
        refine_generators = derived_generators(generators)
        cost = StageCost()

        with cost.stage("text", self._execution_device):
            encoded = self.encode(prompts, negative_prompt, recipe, window_prompts)
        with cost.stage("draft", self._execution_device):
            if draft_latents is None and recipe.needs_draft:
                draft_latents = self.draft(
                    encoded, recipe, generators, self._after_step("draft", recipe.draft_steps, progress, None)
                )
        with cost.stage("refine", self._execution_device):
            after_step = self._after_step("refine", recipe.steps, progress, callback_on_step_end)
            latents = self.refine(encoded, recipe, draft_latents, refine_generators, after_step)
        with cost.stage("decode", self._execution_device):
            images: Any = latents if output_type == "latent" else self.decode(latents, wrap)
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
            recipe = Recipe.of(
                self.settings, self.method, height, width, scale=scale, draft_steps=steps,
                draft_guidance_scale=guidance_scale,
            )  # fmt: skip
            encoded = self.encode(prompts, "", recipe)
        with cost.stage("draft", self._execution_device):
            latents = self.draft(encoded, recipe, generators)
        return latents, cost

    def _checked_drafts(self, draft_latents: Tensor, count: int) -> Tensor:
        shape, channels = tuple(draft_latents.shape), self.base.latent_channels
        if len(shape) != 4 or shape[:2] != (count, channels):
            raise UserError(
                f"draft_latents have the shape {list(shape)}, but {count} pictures need [{count}, {channels}, h, w]"
            )
        return draft_latents.to(self._execution_device, torch.float32)

    def _after_step(
        self, stage: str, steps: int, progress: Progress | None, callback: StepEnd | None
    ) -> AfterStep | None:
        if progress is None and callback is None:
            return None

        def after_step(index: int, timestep: Tensor, latents: Tensor) -> Tensor | None:
            if progress is not None:
                progress(stage, index + 1, steps)
            if callback is None:
                return None
            return (callback(self, index, timestep, {"latents": latents}) or {}).get("latents")

        return after_step
