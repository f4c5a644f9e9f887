"""Windows of a finished picture made anew: which file, which windows, and what is kept of the making of the rest."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scale_dit.data.decode import PictureError, open_picture, reading, to_rgb
from scale_dit.errors import UserError
from scale_dit.files import sha256_of
from scale_dit.generation.files import Files
from scale_dit.generation.folder import OutputFolder
from scale_dit.generation.job import Job
from scale_dit.generation.photo import DraftPhoto
from scale_dit.generation.pictures import Picture
from scale_dit.generation.prompts import Prompt
from scale_dit.generation.window_prompts import read_box, read_window_prompts
from scale_dit.layout import Layout
from scale_dit.local_control import WindowPrompt
from scale_dit.picture_files import opened, picture_bits, read_provenance, to_uint8
from scale_dit.recipe import Recipe
from scale_dit.regions import tokens_of_boxes, tokens_of_mask, whole_windows

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FinishedPicture:
    """A picture file, whoever made it.

    Args:
        path: The file.

    Raises:
        UserError: It cannot be read, or has more than 8 bits a value, which reading it would cut.
    """

    path: Path

    def __post_init__(self) -> None:
        _ = self.photo
        with opened(self.path) as image:
            if image.mode != "RGB" or "icc_profile" in image.info:
                log.warning("%s is taken as 8-bit sRGB without transparency; what stays is kept as that", self.path)
        if (bits := picture_bits(self.path)) > 8:
            raise UserError(
                f"remake={self.path}: the picture has {bits} bits a value, of which the windows that stay could keep 8 "
                "only: give a file of 8 bits"
            )

    @cached_property
    def photo(self) -> DraftPhoto:
        """The picture as a draft of itself."""
        return DraftPhoto(self.path)

    @cached_property
    def provenance(self) -> dict[str, Any] | None:
        """What this project wrote into it; `None` if somebody else made it."""
        return read_provenance(self.path)

    def pixels(self) -> Tensor:
        """Uint8 `[3, H, W]`."""
        with opened(self.path) as image:
            return to_uint8(to_rgb(image))

    def latents(self, settings: Mapping[str, Any]) -> Tensor | None:
        """Its latents `[1, C, h, w]`, if they were kept (`keep_latents=true`), and nobody painted over it since.

        Args:
            settings: Of a run that asks for them: another base's latents mean nothing to it.
        """
        return self._kept("refine", "steps", settings)

    def draft(self, settings: Mapping[str, Any]) -> Tensor | None:
        """The draft under it, `[1, C, h, w]`, as `latents`."""
        return self._kept("draft", "draft_steps", settings)

    def _kept(self, stage: str, steps: str, settings: Mapping[str, Any]) -> Tensor | None:
        """Latents of a stage whose number of steps is the setting `steps`."""
        folder, picture = self._folder(settings), self.picture
        if folder is None or picture is None:
            return None
        count = folder.settings["sampling"][steps] or folder.settings["base"]["steps"]
        return folder.finished(picture, stage, count)

    def _folder(self, settings: Mapping[str, Any]) -> OutputFolder | None:
        """Its folder, if the same base made it and the file is what its latents led to."""
        if self.picture is None or self.provenance is None:
            return None
        made = self.provenance["settings"]
        folder = OutputFolder(self.path.parent, made)

        def base_of(found: Mapping[str, Any]) -> tuple[Any, ...]:
            return found["base"]["name"], found["weights"] or found["base"]["path"]

        usable = base_of(made) == base_of(settings) and folder.latents.led_to(self.picture.stem, self.path)
        return folder if usable else None

    @cached_property
    def picture(self) -> Picture | None:
        """What it was made from; `None` if somebody else made it."""
        made = {"window_prompts": []} | (self.provenance or {})
        if not {"settings", *(part.name for part in fields(Picture))} <= made.keys():
            return None
        own = {part.name: made[part.name] for part in fields(Picture)}
        return Picture(**own | {"window_prompts": read_window_prompts(own["window_prompts"])})


@dataclass(frozen=True)
class Remake:
    """Windows of a finished picture that are made anew.

    Args:
        source: The picture.
        boxes: In px; every window that one of them touches is made anew.
        mask: A picture as large as the source: as boxes, where it is white.

    Raises:
        UserError: Neither or both are given, a box is none, or the mask cannot be read.
    """

    source: FinishedPicture
    boxes: Sequence[Sequence[int]] | None = None
    mask: Path | None = None

    def __post_init__(self) -> None:
        if (self.boxes is None) == (self.mask is None):
            raise UserError("remake needs to know where: give boxes=[[left,top,right,bottom]] in px, or mask=mask.png")
        for box in self.boxes or ():
            read_box(box)
        _ = self._white

    @classmethod
    def of(cls, path: str | None, boxes: Any, mask: str | None) -> Remake | None:
        """What the options `remake`, `boxes` and `mask` mean; `None`: nothing is made anew.

        Raises:
            UserError: They cannot be used.
        """
        if path is None:
            if boxes is not None or mask is not None:
                raise UserError("boxes and mask say what to make anew of a picture: give it as remake=picture.png")
            return None
        if boxes is not None and not isinstance(boxes, list):
            raise UserError(f"boxes is {boxes!r}: give a list such as boxes=[[0,0,512,256]], in px")
        return cls(FinishedPicture(Path(path)), boxes, None if mask is None else Path(mask))

    def prompt(self, windows: Sequence[WindowPrompt] | None = None) -> Prompt:
        """What the picture was made from.

        Args:
            windows: What windows show instead; `None`: as before.

        Raises:
            UserError: Somebody else made it.
        """
        made = self.source.picture
        if made is None:
            raise UserError(f"{self.source.path} does not say what it shows: say it with prompt='...'")
        windows = made.window_prompts if windows is None else tuple(windows)
        return Prompt(made.prompt, window_prompts=windows, source="its prompt")

    def size(self, height: int | None, width: int | None, token_size: int) -> dict[str, int]:
        """The picture's height and width in px.

        Raises:
            UserError: Others were asked for, or it has no whole tokens.
        """
        own = self.source.photo.size
        if (height or own[0], width or own[1]) != own:
            raise UserError(
                f"remake keeps the picture's size, {own[1]} x {own[0]} px: leave out height={height} and width={width}"
            )
        if own[0] % token_size or own[1] % token_size:
            raise UserError(
                f"{self.source.path} has {own[1]} x {own[0]} px, no multiples of {token_size}: crop or resize it"
            )
        return {"height": own[0], "width": own[1]}

    def check(
        self, pictures: Sequence[Picture], output: Path, files: Files, job: Job, photo: DraftPhoto | None
    ) -> None:
        """Refuse what would not leave the rest of the picture as it is, or the picture itself.

        Raises:
            UserError: Another size than the picture's, its own folder, a format that loses something, a draft, or a
                stage that it has not.
        """
        for picture in pictures:
            if (picture.height, picture.width) != self.source.photo.size:
                self.size(picture.height, picture.width, 1)
        if output.resolve() == self.source.path.resolve().parent:
            raise UserError(f"output={output} is the folder of {self.source.path} itself: choose another")
        if files.quality is not None:
            raise UserError(f"quality={files.quality} would change all of the picture: leave it out with remake")
        if photo is not None or job.stage not in ("all", "decode"):
            raise UserError("remake goes with neither draft=... nor a stage but stage=decode: leave them out")

    def chosen(self, layout: Layout, token_size: int) -> Tensor:
        """Tokens of the windows that are made anew, bool `[height, width]`.

        Raises:
            UserError: A box or the mask does not fit the picture.
        """
        if self._white is not None:
            touched = tokens_of_mask(self._white, layout.image)
        else:
            touched = tokens_of_boxes([read_box(box) for box in self.boxes or ()], layout.image, token_size)
        return whole_windows(touched, layout)

    def encoded_sizes(self, recipe: Recipe, kept: Mapping[str, bool]) -> list[tuple[int, int]]:
        """At which sizes (height, width) in px its picture is encoded.

        Args:
            kept: Whether its `latents` and its `draft` are there.
        """
        draft = [recipe.draft_size] if recipe.needs_draft and not kept["draft"] else []
        return draft if kept["latents"] else [*draft, recipe.size]

    def settings(self, run: Mapping[str, Any]) -> dict[str, Any]:
        """What decides what it leads to, as plain values.

        Args:
            run: The other settings of the run.
        """
        mask = None if self.mask is None else sha256_of(self.mask)[:16]
        boxes = None if self.boxes is None else [list(box) for box in self.boxes]
        kept = {"latents": self.source.latents(run) is not None, "draft": self.source.draft(run) is not None}
        return {"picture": self.source.photo.digest, "boxes": boxes, "mask": mask, "kept": kept}

    @cached_property
    def _white(self) -> Tensor | None:
        """Where the mask is white, bool `[H, W]`."""
        if self.mask is None:
            return None
        try:
            with reading(), open_picture(self.mask) as image:
                levels = torch.from_numpy(np.array(image.convert("RGBA"))).float() / 255
                return levels[..., :3].mean(-1) * levels[..., 3] > 0.5  # what is transparent is not painted
        except PictureError as error:
            raise UserError(f"the mask {self.mask} cannot be used ({error}): {error.remedy}") from error
