"""An existing picture in place of a draft: super-resolution."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from scale_dit.data.decode import PictureError, open_picture, to_rgb, upright_size
from scale_dit.errors import UserError
from scale_dit.files import sha256_of
from scale_dit.models.settings import BaseSettings
from scale_dit.recipe import Recipe

if TYPE_CHECKING:
    from scale_dit.pipeline import ScaleDiTPipeline


@dataclass(frozen=True)
class PhotoLatents:
    """A draft's latents `[1, C, h, w]`.

    Attributes:
        draft: At the draft's size.
        begin: At the picture's size, if there is more to it than the draft upsampled.
    """

    draft: Tensor
    begin: Tensor | None


@dataclass(frozen=True)
class DraftPhoto:
    """A picture file that stands for the draft.

    Orientation, colour profile, transparency (over white) and bit depth are taken care of by `scale_dit.data.decode`.

    Args:
        path: The file.

    Raises:
        UserError: It cannot be read.
    """

    path: Path

    def __post_init__(self) -> None:
        _ = self.size, self.digest

    @cached_property
    def size(self) -> tuple[int, int]:
        """Height and width in px, upright."""
        try:
            with open_picture(self.path) as image:
                return upright_size(image)
        except PictureError as error:
            raise self._unusable(error) from error

    @cached_property
    def digest(self) -> str:
        """Of the file's bytes."""
        return sha256_of(self.path)[:16]

    def fitting_size(self, base: BaseSettings, side: int) -> tuple[int, int]:
        """Height and width in px, of its aspect, of whole tokens, with about as many pixels as a square of `side`."""
        height, width = self.size
        token = base.token_size
        stretch = (height / width) ** 0.5
        return max(1, round(side * stretch / token)) * token, max(1, round(side / stretch / token)) * token

    def check_aspect(self, base: BaseSettings, height: int, width: int) -> None:
        """Refuse a size that would distort it by more than a token; in px.

        Raises:
            UserError: With sizes that would not.
        """
        own_height, own_width = self.size
        wanted = width * own_height / own_width
        if abs(wanted - height) > base.token_size:
            token = base.token_size
            same_width = max(1, round(wanted / token)) * token
            same_height = max(1, round(height * own_width / own_height / token)) * token
            raise UserError(
                f"the draft {self.path} has {own_width} x {own_height} px, an aspect that {width} x {height} px would "
                f"distort: use height={same_width} width={width}, height={height} width={same_height}, or crop it"
            )

    def encoded_sizes(self, recipe: Recipe) -> list[tuple[int, int]]:
        """At which sizes (height, width) in px `latents` encodes it, if a picture needs it."""
        found = [recipe.draft_size] if recipe.needs_draft else []
        return [*found, recipe.size] if recipe.starts_from_draft else found

    def latents(self, pipeline: ScaleDiTPipeline, recipe: Recipe) -> PhotoLatents:
        """Its latents at the draft's size, and at the picture's where refinement starts from it.

        Raises:
            UserError: It cannot be read.
        """
        begin = self._encoded(pipeline, recipe.size) if recipe.starts_from_draft else None
        return PhotoLatents(self.draft_latents(pipeline, recipe), begin)

    def draft_latents(self, pipeline: ScaleDiTPipeline, recipe: Recipe) -> Tensor:
        """Its latents at the draft's size, `[1, C, h, w]`.

        Raises:
            UserError: It cannot be read.
        """
        return self._encoded(pipeline, recipe.draft_size)

    def _encoded(self, pipeline: ScaleDiTPipeline, size: tuple[int, int]) -> Tensor:
        return pipeline.base.encode_images(self._pixels(*size)).to(pipeline._execution_device)

    def _pixels(self, height: int, width: int) -> Tensor:
        """`[1, 3, height, width]` in [0, 1]."""
        try:
            with open_picture(self.path) as image:
                own_height, own_width = upright_size(image)
                return to_rgb(image, (0, 0, own_width, own_height), (height, width))[None]
        except PictureError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: PictureError) -> UserError:
        return UserError(f"the picture {self.path} cannot be used ({error}): {error.remedy}")
