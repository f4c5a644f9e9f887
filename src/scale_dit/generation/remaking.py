"""A finished picture in the making again: chosen windows are denoised anew, and their pixels put into its own."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from scale_dit.generation.maker import Making, Workshop
from scale_dit.generation.photo import PhotoLatents
from scale_dit.generation.pictures import Picture
from scale_dit.generation.remake import Remake
from scale_dit.regions import blending
from scale_dit.sampling import derived_generators


class Remaking(Making):
    """As `Making`, of windows of a finished picture. Its draft and its latents are those that were kept; else the
    picture itself is its draft, and is encoded.
    """

    decode_remedy: ClassVar[tuple[str, ...]] = ("stage=decode", "memory.decode=host")
    """Tiles would have other contrasts than the pixels around them."""

    def __init__(self, workshop: Workshop, picture: Picture, remake: Remake):
        super().__init__(workshop, picture)
        self.remake = remake
        self.layout, self.token_size = self.recipe.plan.layout, self.pipeline.settings.token_size
        self.chosen = remake.chosen(self.layout, self.token_size)

    def is_whole(self, stage: str) -> bool:
        """Whether every stage ran."""
        return self.cost.seconds.keys() >= {"text", "refine", "decode"} and not self.resumed

    @cached_property
    def _drafted(self) -> PhotoLatents:
        kept = self.remake.source.draft(self.folder.settings)
        if kept is not None:
            return PhotoLatents(kept.to(self._device), None)
        with self._cost("draft"):
            return PhotoLatents(self.remake.source.photo.draft_latents(self.pipeline, self.recipe), None)

    @cached_property
    def _finished(self) -> Tensor:
        """The picture's latents."""
        kept = self.remake.source.latents(self.folder.settings)
        if kept is None:
            with self._cost("draft"):
                kept = self.pipeline.base.encode_images(self.remake.source.pixels()[None] / 255)
        return kept.to(self._device)

    def _refined(self) -> Tensor:
        recipe, saved = self.recipe, self._saved("refine")
        if saved is not None and saved[1] == recipe.steps:
            return saved[0]
        draft = self._drafted.draft if recipe.needs_draft else None
        prompts, finished = self.prompts, self._finished
        keeper = self._keeper("refine")
        with self._cost("refine"), keeper.saving():
            return self.pipeline.remake(
                prompts, recipe, draft, finished, self.chosen, self._generators(), keeper.after_step, resumed=saved
            )

    def _generators(self) -> list[torch.Generator]:
        """Another noise for every source: that of what it was made with would lead to what is there."""
        seed = self.picture.seed ^ int(self.remake.source.photo.digest, 16)
        return derived_generators([torch.Generator().manual_seed(seed % 2**63)])

    def keep(self, latents: Tensor) -> None:
        """Decode latents `[1, C, h, w]`, and write the picture with the chosen windows from them."""
        super().keep(latents)
        if self.folder.files.keep_latents:
            self._keep_draft()

    def _completed(self, decoded: Iterator[Tensor]) -> Iterator[Tensor]:
        """The picture from the top, `[3, rows, W]` in [0, 1]: its own pixels, and those of the chosen windows.

        The whole is decoded, since a decoder's norms and attention see it all: a box decoded by itself would have other
        contrasts.
        """
        token = self.token_size
        chosen = self.chosen.repeat_interleave(token, 0).repeat_interleave(token, 1)
        pixels, weights, top = self.remake.source.pixels(), blending(chosen, token, self.recipe.wrap), 0
        for band in decoded:
            rows = slice(top, top + band.shape[1])
            yield (pixels[:, rows] / 255).lerp(band.cpu(), weights[rows])
            top = rows.stop

    def _keep_draft(self) -> None:
        """Let the remade picture be made anew in turn, over the same draft."""
        if self.recipe.needs_draft:
            self.folder.save(self.picture, "draft", self._drafted.draft, self.recipe.draft_steps)
