"""Windows of a finished picture made anew: which file, which windows, and what is kept of the making of the rest."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from scale_dit.data.decode import PictureError, open_picture, to_rgb
from scale_dit.errors import UserError
from scale_dit.generation.folder import OutputFolder
from scale_dit.generation.job import Job
from scale_dit.generation.photo import DraftPhoto
from scale_dit.generation.pictures import Picture
from scale_dit.generation.prompts import Prompt
from scale_dit.generation.window_prompts import read_box, read_window_prompts
from scale_dit.layout import Layout
from scale_dit.local_control import WindowPrompt
from scale_dit.picture_files import opened, picture_bits, read_provenance, to_uint8
from scale_dit.regions import tokens_of_boxes, tokens_of_mask, whole_windows


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

    @cached_property
    def latents(self) -> Tensor | None:
        """Its latents `[1, C, h, w]`, if they were kept (`keep_latents=true`)."""
        if self._folder is None or self.picture is None:
            return None
        settings = self._folder.settings
        steps = settings["sampling"]["steps"] or settings["base"]["steps"]
        return self._folder.finished_latents(self.picture, steps)

    @cached_property
    def draft(self) -> Tensor | None:
        """The draft under it, `[1, C, h, w]`, if it was kept."""
        if self._folder is None or self.picture is None:
            return None
        name = f"{self.picture.stem}.draft"
        found = self._folder.latents.load(name, self._folder.draft_fingerprint(self.picture))
        return None if found is None else found[0]

    @property
    def _folder(self) -> OutputFolder | None:
        return None if self.provenance is None else OutputFolder(self.path.parent, self.provenance["settings"])

    @property
    def picture(self) -> Picture | None:
        """What it was made from; `None` if somebody else made it."""
        made = self.provenance
        if made is None:
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

    def prompt(self, windows: Sequence[WindowPrompt] = ()) -> Prompt:
        """What the picture was made from.

        Args:
            windows: What windows show instead; by default as before.

        Raises:
            UserError: Somebody else made it.
        """
        made = self.source.picture
        if made is None:
            raise UserError(f"{self.source.path} does not say what it shows: say it with prompt='...'")
        windows = tuple(windows) or made.window_prompts
        return Prompt(made.prompt, negative_prompt=made.negative_prompt, window_prompts=windows, source="its prompt")

    def check(self, height: int | None, width: int | None, photo: DraftPhoto | None, job: Job) -> None:
        """Refuse options that mean nothing for a finished picture.

        Raises:
            UserError: Another size than the picture's, a draft, or a single stage.
        """
        own = self.source.photo.size
        if (height or own[0], width or own[1]) != own:
            raise UserError(
                f"remake keeps the picture's size, {own[1]} x {own[0]} px: leave out height={height} and width={width}"
            )
        if photo is not None or job.stage != "all":
            raise UserError("remake goes with neither draft=... nor stage=...: leave them out")

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

    def settings(self) -> dict[str, Any]:
        """What decides what it leads to, as plain values."""
        mask = None if self.mask is None else hashlib.sha256(self.mask.read_bytes()).hexdigest()[:16]
        boxes = None if self.boxes is None else [list(box) for box in self.boxes]
        kept = {name: getattr(self.source, name) is not None for name in ("latents", "draft")}
        return {"picture": self.source.photo.digest, "boxes": boxes, "mask": mask, "kept": kept}

    @cached_property
    def _white(self) -> Tensor | None:
        """Where the mask is white, bool `[H, W]`."""
        if self.mask is None:
            return None
        try:
            with open_picture(self.mask) as image:
                return to_rgb(image).mean(0) > 0.5
        except PictureError as error:
            raise UserError(
                f"the mask {self.mask} cannot be used ({error}): give a picture file such as PNG"
            ) from error
