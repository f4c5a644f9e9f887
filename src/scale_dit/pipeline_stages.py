"""The stages of a picture, which can be run and taken up one by one: text, draft, refine, decode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scale_dit.autoencoder import Decoding
from scale_dit.local_control import WindowPrompt, WindowText, local_prompts, remake
from scale_dit.method import Plan
from scale_dit.models.text import Text
from scale_dit.pipeline_loading import LoadedPipeline
from scale_dit.recipe import Recipe
from scale_dit.regions import moved
from scale_dit.sampling import add_noise, upsample_latents
from scale_dit.stage import AfterStep, Stage
from scale_dit.wrapping import STILL, Shift


@dataclass(frozen=True)
class Prompts:
    """Encoded prompts.

    Attributes:
        text: What the pictures show.
        negative: The second branch of classifier-free guidance, if a stage evaluates it.
        windows: What windows of the large pictures show instead.
    """

    text: Text
    negative: Text | None
    windows: Sequence[WindowText] = ()


class StagedPipeline(LoadedPipeline):
    """The stages over a loaded base. All that one takes from the one before is in its arguments.

    Latents are normalised, `[B, C, h, w]`, float32. What a stage does is decided by the recipe, the prompts and the
    generators alone, so a stage whose result was kept need not be run again.
    """

    @torch.no_grad()
    def encode(
        self, prompts: Sequence[str], negative_prompt: str, recipe: Recipe, windows: Sequence[WindowPrompt] = ()
    ) -> Prompts:
        """Encode what the stages of a recipe read.

        Args:
            windows: For all pictures.

        Raises:
            UserError: A window's box is empty or leaves the picture.
        """
        grid, count = recipe.plan.layout.image, len(prompts)
        touched = [each.tokens(grid, self.settings.token_size) for each in windows]
        text = self.base.encode_prompts(prompts)
        negative = self.base.encode_prompts([negative_prompt] * count) if recipe.has_negative_branch else None
        texts = [self.base.encode_prompts([each.prompt] * count) for each in windows]
        return Prompts(text, negative, tuple(map(WindowText, touched, texts)))

    @torch.no_grad()
    def draft(
        self,
        prompts: Prompts,
        recipe: Recipe,
        generators: Sequence[torch.Generator],
        after_step: AfterStep | None = None,
    ) -> Tensor:
        """Make the drafts."""
        return self.resume_draft(prompts, recipe, self.noise(recipe.draft_plan, generators), 0, after_step)

    @torch.no_grad()
    def resume_draft(
        self, prompts: Prompts, recipe: Recipe, latents: Tensor, first_step: int, after_step: AfterStep | None = None
    ) -> Tensor:
        """Go on with drafts of which `first_step` steps are done, from the latents that they led to."""
        plan = recipe.draft_plan
        stage = Stage(self.base, plan, prompts.text, prompts.negative, recipe.draft_guidance_scale)
        if recipe.wrap != "none":
            still = stage
            stage = replace(stage, moved=lambda step: (still, recipe.draft_shift(step)))
        return stage.sample(latents, recipe.draft_scheduler(self._execution_device, first_step), after_step)

    @torch.no_grad()
    def refine(
        self,
        prompts: Prompts,
        recipe: Recipe,
        draft_latents: Tensor | None,
        generators: Sequence[torch.Generator],
        after_step: AfterStep | None = None,
        *,
        begin: Tensor | None = None,
    ) -> Tensor:
        """Denoise the large picture, which reads the draft.

        Args:
            begin: What refinement starts from below a `start` of 1, and what low frequencies are pulled towards, at the
                picture's size; by default the upsampled draft.
        """
        begin = self.beginning(recipe, draft_latents) if begin is None else begin
        latents = self.noise(recipe.plan, generators)
        if begin is not None:
            latents = add_noise(begin, latents, recipe.start)
        return self.resume_refine(prompts, recipe, draft_latents, latents, 0, after_step, begin=begin)

    @torch.no_grad()
    def resume_refine(
        self,
        prompts: Prompts,
        recipe: Recipe,
        draft_latents: Tensor | None,
        latents: Tensor,
        first_step: int,
        after_step: AfterStep | None = None,
        *,
        begin: Tensor | None = None,
    ) -> Tensor:
        """Go on with a refinement of which `first_step` steps are done, from the latents that they led to."""
        begin = self.beginning(recipe, draft_latents) if begin is None else begin
        stage = self.refine_stage(prompts, recipe, draft_latents, begin)
        return stage.sample(latents, recipe.scheduler(self._execution_device, first_step), after_step)

    @torch.no_grad()
    def remake(
        self,
        prompts: Prompts,
        recipe: Recipe,
        draft_latents: Tensor | None,
        finished: Tensor,
        chosen: Tensor,
        generators: Sequence[torch.Generator],
        after_step: AfterStep | None = None,
        *,
        resumed: tuple[Tensor, int] | None = None,
    ) -> Tensor:
        """Denoise tokens of finished pictures anew, from the level `recipe.start` on; see `local_control.remake`.

        Args:
            finished: The pictures' latents.
            chosen: Bool `[height, width]`, in tokens; see `regions.whole_windows`.
            resumed: Latents of an earlier call, and the steps that led to them.
        """
        stage = self.refine_stage(prompts, recipe, draft_latents, self.beginning(recipe, draft_latents))
        latents, step = resumed or (None, 0)
        scheduler = recipe.scheduler(self._execution_device, step)
        noise = self.noise(recipe.plan, generators)
        return remake(stage, chosen, finished, noise, scheduler, after_step, latents=latents)

    def refine_stage(
        self, prompts: Prompts, recipe: Recipe, draft_latents: Tensor | None, begin: Tensor | None
    ) -> Stage:
        """What refinement asks of the base at every step, the guidance pass done."""
        layout, guidance = recipe.plan.layout, None
        if layout.guidance is not None:
            assert draft_latents is not None
            guidance = self._guidance_latents(draft_latents, recipe.plan)
        if recipe.wrap == "none":
            return self._moved_stage(prompts, recipe, guidance, begin, STILL)

        def moved_at(step: int) -> tuple[Stage, tuple[int, int]]:
            shift = recipe.shift(step)
            return self._moved_stage(prompts, recipe, guidance, begin, shift), shift.image

        without = self._moved_stage(prompts, recipe, None, begin, STILL)  # every step has a guidance pass of its own
        return replace(without, moved=moved_at)

    def _moved_stage(
        self,
        prompts: Prompts,
        recipe: Recipe,
        guidance: Tensor | None,
        begin: Tensor | None,
        shift: Shift,
    ) -> Stage:
        """The stage over a picture and its draft that are moved."""
        plan, keys_values, pull = recipe.plan, None, None
        if guidance is not None and plan.layout.guidance is not None:
            tokens = self.base.pack(moved(guidance, plan.layout.guidance, shift.draft), plan.layout.guidance_order)
            keys_values = self.base.guidance_pass(tokens, prompts.text.pooled, plan, recipe.guidance_scale)
        if begin is not None and recipe.low_pass.strength > 0:
            pull = moved(begin, plan.layout.image, shift.image), recipe.low_pass
        local = local_prompts(prompts.windows, plan.layout, shift.image, recipe.wrap)
        return Stage(
            self.base, plan, prompts.text, prompts.negative, recipe.guidance_scale, keys_values, pull, local=local
        )

    def beginning(self, recipe: Recipe, draft_latents: Tensor | None) -> Tensor | None:
        """The draft at the picture's size, if the recipe starts from it or is pulled towards it."""
        if draft_latents is None or not recipe.starts_from_draft:
            return None
        grid = recipe.plan.layout.image
        return upsample_latents(draft_latents, 2 * grid.height, 2 * grid.width)

    def decode(self, latents: Tensor, wrap: str | None = None) -> Tensor:
        """Latents `[B, C, h, w]` -> pictures `[B, 3, 8h, 8w]` in [0, 1], in the way that `decoding` says.

        Args:
            wrap: Which edges join; by default those of `decoding`.
        """
        how = self.decoding if wrap is None else replace(self.decoding, wrap=wrap)
        return torch.cat([self.base.decode_latents(one[None], how).cpu() for one in latents])

    def decoding_of(self, latents: Tensor) -> Decoding:
        """`decoding` with the mode in which latents `[1, C, h, w]` are decoded now."""
        return self.base.decoding_of(latents, self.decoding)

    def decode_bands(self, latents: Tensor, how: Decoding | None = None) -> Iterator[Tensor]:
        """One picture `[1, C, h, w]` in bands `[3, rows, 8w]` in [0, 1] from the top.

        Args:
            how: By default as `decoding` says.
        """
        for _, band in self.base.decode_bands(latents, how or self.decoding):
            yield band[0]

    def noise(self, plan: Plan, generators: Sequence[torch.Generator]) -> Tensor:
        """Standard normal latents of a plan's picture, one for each generator, drawn on its device."""
        grid = plan.layout.image
        noise = [self.base.noise(grid.height, grid.width, each) for each in generators]
        return torch.cat([one.to(self._execution_device) for one in noise])

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
