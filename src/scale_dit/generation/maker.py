"""One picture from its prompt to its file: every stage whose result is on disk is taken from there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from scale_dit.errors import UserError
from scale_dit.generation.disk import writing
from scale_dit.generation.folder import OutputFolder
from scale_dit.generation.photo import DraftPhoto, PhotoLatents
from scale_dit.generation.pictures import Picture, Sampling
from scale_dit.picture_files import save_picture
from scale_dit.pipeline import ScaleDiTPipeline
from scale_dit.pipeline_output import StageCost
from scale_dit.pipeline_stages import Prompts
from scale_dit.sampling import derived_generators

Report = Callable[[str, int, int], None]
"""Called after every step with the stage, the steps done and the steps in all."""


@dataclass(frozen=True)
class Workshop:
    """What all pictures of a run are made with.

    Args:
        pipeline: Loaded, and on its device.
        sampling: How.
        folder: Where pictures and latents go.
        report: Hears of every step.
        photo: A picture to use instead of drafts.
    """

    pipeline: ScaleDiTPipeline
    sampling: Sampling
    folder: OutputFolder
    report: Report
    photo: DraftPhoto | None = None


class Making:
    """One picture in the making.

    Attributes:
        cost: What its stages cost; one that is taken from disk is not among them.
        resumed: Whether steps of a stage were on disk.
    """

    decode_remedy: ClassVar[tuple[str, ...]] = ("stage=decode", "memory.decode=tiled")

    def __init__(self, workshop: Workshop, picture: Picture):
        self.pipeline, self.folder, self.photo = workshop.pipeline, workshop.folder, workshop.photo
        self.report, self.picture = workshop.report, picture
        self.recipe = workshop.sampling.recipe(
            self.pipeline.settings, self.pipeline.method, picture.height, picture.width
        )
        self.cost = StageCost()
        self.resumed = False

    def is_whole(self, stage: str) -> bool:
        """Whether every stage ran, so that the cost is that of a picture, or of a draft where `stage` is `draft`."""
        drafts = {"draft"} if self.recipe.needs_draft else set()
        refines = {"refine"} if stage != "draft" else set()
        return self.cost.seconds.keys() >= {"text", "decode"} | drafts | refines and not self.resumed

    def draft(self) -> None:
        """Make the draft, and a preview of it as a picture.

        Raises:
            UserError: No draft is needed; the disk is full, or memory runs out: what is saved stays.
        """
        if not self.recipe.needs_draft:
            raise UserError("stage=draft: these pictures read no draft (method.guidance=false); use stage=all")
        with enough_memory("draft", self.folder, "memory=least"):
            latents = self._drafted.draft
            with self._cost("decode"):
                preview = self.pipeline.decode(latents)[0]
        with writing(self.folder):
            save_picture(preview, self.folder.draft_file(self.picture))

    def refine_and_decode(self) -> None:
        """Make the picture, from its saved latents or its draft where they are there.

        Raises:
            UserError: The disk is full, or memory runs out; what is saved stays.
        """
        with enough_memory("refine", self.folder, "memory=least"):
            latents = self._refined()
        self._decode(latents)

    def decode(self) -> None:
        """Decode the picture from its finished latents, if they are still there.

        Raises:
            UserError: The disk is full, or memory runs out; what is saved stays.
        """
        latents = self.folder.finished(self.picture, "refine", self.recipe.steps)
        if latents is not None:
            self._decode(latents.to(self._device))

    def _saved(self, stage: str) -> tuple[Tensor, int] | None:
        """Latents of the stage `draft` or `refine`, and the steps that led to them; `None` if it begins anew."""
        found = self.folder.saved(self.picture, stage)
        if found is None:
            return None
        self.resumed = True
        return found[0].to(self._device), found[1]

    def _keeper(self, stage: str) -> LatentsKeeper:
        """What saves the steps of the stage `draft` or `refine`."""
        steps = self.recipe.draft_steps if stage == "draft" else self.recipe.steps
        return LatentsKeeper(self.folder, self.picture, stage, steps, self.report)

    @cached_property
    def prompts(self) -> Prompts:
        """The encoded prompt, and what is beside it."""
        with self._cost("text"):
            picture = self.picture
            return self.pipeline.encode([picture.prompt], picture.negative_prompt, self.recipe, picture.window_prompts)

    @cached_property
    def _drafted(self) -> PhotoLatents:
        """The draft: the photo, or made from what is on disk, or a new one."""
        if self.photo is not None:
            with self._cost("draft"):
                return self.photo.latents(self.pipeline, self.recipe)
        recipe, saved = self.recipe, self._saved("draft")
        if saved is not None and saved[1] == recipe.draft_steps:
            return PhotoLatents(saved[0], None)
        with enough_memory("draft", self.folder, "memory=least"):
            prompts, keeper = self.prompts, self._keeper("draft")
            with self._cost("draft"), keeper.saving():
                if saved is not None:
                    latents = self.pipeline.resume_draft(prompts, recipe, *saved, keeper.after_step)
                else:
                    latents = self.pipeline.draft(prompts, recipe, [self._generator()], keeper.after_step)
        return PhotoLatents(latents, None)

    def _refined(self) -> Tensor:
        """Finished latents, from what is on disk or from the draft."""
        recipe, saved = self.recipe, self._saved("refine")
        if saved is not None and saved[1] == recipe.steps:
            return saved[0]
        draft, begin = (self._drafted.draft, self._drafted.begin) if recipe.needs_draft else (None, None)
        prompts, keeper = self.prompts, self._keeper("refine")
        with self._cost("refine"), keeper.saving():
            if saved is not None:
                return self.pipeline.resume_refine(prompts, recipe, draft, *saved, keeper.after_step, begin=begin)
            generators = derived_generators([self._generator()])
            return self.pipeline.refine(prompts, recipe, draft, generators, keeper.after_step, begin=begin)

    def keep(self, latents: Tensor) -> None:
        """Decode latents `[1, C, h, w]` and write the picture."""
        with self._cost("decode"):
            decoding = self.pipeline.decoding_of(latents)
        decoded = self.cost.each("decode", self._device, self.pipeline.decode_bands(latents, decoding))
        self.folder.keep(self.picture, self._completed(decoded), self.cost, decoding)

    def _completed(self, decoded: Iterator[Tensor]) -> Iterator[Tensor]:
        """What the file shows, of decoded bands `[3, rows, W]`."""
        return decoded

    def _decode(self, latents: Tensor) -> None:
        with enough_memory("decode", self.folder, *self.decode_remedy):
            self.keep(latents)
        if self.folder.files.keep_latents:
            with writing(self.folder):
                self.folder.latents.tie(self.picture.stem, self.folder.file(self.picture))
        else:
            self.folder.latents.remove(f"{self.picture.stem}.refine")
            if not self.folder.draft_file(self.picture).is_file():  # nobody chose from drafts, or will again
                self.folder.latents.remove(f"{self.picture.stem}.draft")

    @property
    def _device(self) -> torch.device:
        return self.pipeline._execution_device

    def _cost(self, stage: str) -> AbstractContextManager[None]:
        return self.cost.stage(stage, self._device)

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.picture.seed)


class LatentsKeeper:
    """Saves the latents of the stage `draft` or `refine`: every few steps, after the last one, and on Ctrl-C."""

    def __init__(self, folder: OutputFolder, picture: Picture, stage: str, steps: int, report: Report):
        self.folder, self.picture, self.stage, self.steps, self.report = folder, picture, stage, steps, report
        self.unsaved: tuple[Tensor, int] | None = None

    def after_step(self, index: int, timestep: Tensor, latents: Tensor) -> None:
        """Hear of a step: `AfterStep`."""
        done = index + 1
        self.unsaved = latents, done
        if done % self.folder.files.save_every == 0 or done == self.steps:
            self.save()
        self.report(self.stage, done, self.steps)

    def save(self) -> None:
        """Save the latents of the last step, if they are not saved yet.

        Raises:
            UserError: They cannot be written.
        """
        if self.unsaved is None:
            return
        self.folder.save(self.picture, self.stage, *self.unsaved)
        self.unsaved = None

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Save what there is when it is interrupted inside, or memory runs out."""
        try:
            yield
        except (KeyboardInterrupt, Exception) as error:
            if isinstance(error, KeyboardInterrupt) or is_out_of_memory(error):
                self.save()
            raise


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or in the host: there, torch raises an error without a class of its own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


@contextmanager
def enough_memory(stage: str, folder: OutputFolder, *remedy: str) -> Iterator[None]:
    """Say how to go on when the device has no memory left.

    Raises:
        UserError: It has none left.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"out of memory in the stage {stage!r} ({str(error).splitlines()[0]}). The steps up to there are saved; go "
            f"on with less memory: {folder.go_on_command(*remedy)}"
        ) from error
