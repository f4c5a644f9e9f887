"""Where the pictures of a run go, and which of them an interrupted run need not make again."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from scale_dit.autoencoder import Decoding
from scale_dit.errors import UserError
from scale_dit.files import write_atomically
from scale_dit.generation.claims import clear_once
from scale_dit.generation.disk import check_space, writing
from scale_dit.generation.files import Files
from scale_dit.generation.latents import SavedLatents
from scale_dit.generation.pictures import Picture
from scale_dit.picture_files import FORMATS, NotFiniteError, fingerprint, read_provenance, write_picture
from scale_dit.pipeline_output import StageCost
from scale_dit.provenance import commit, machine, versions
from scale_dit.resuming import GENERATE, go_on_command, resume_command
from scale_dit.run_folder import RECORD

log = logging.getLogger(__name__)

FINISHED = "pictures.jsonl"
"""List of the pictures of a finished run, beside them; it can be given as a prompt file again."""

LATENTS, DRAFTS = "latents", "drafts"
SHEET, SHEET_LIST = "contact_sheet.png", "contact_sheet.json"
PICTURES = "[0-9][0-9][0-9][0-9][0-9]_seed*"
OF_REFINEMENT = ("steps", "guidance_scale", "start", "low_pass", "low_pass_schedule", "low_pass_until", "decode_tile")
"""Sampling that leaves drafts as they are, as all of the method does: a draft's scale comes from its size."""


@dataclass(frozen=True)
class OutputFolder:
    """Where the pictures of one run go.

    Args:
        path: The folder.
        settings: What all its pictures share and what decides what they look like; plain values.
        files: How they are written.
        config: The resolved config, for the pictures' metadata.
        decoding: How pictures are asked to be decoded.
    """

    path: Path
    settings: Mapping[str, Any]
    files: Files = field(default_factory=Files)
    config: Mapping[str, Any] | None = None
    decoding: Decoding = field(default_factory=Decoding)

    program: ClassVar[str] = GENERATE
    texts: ClassVar[tuple[str, ...]] = ()
    """What is encoded beside the pictures' own prompts."""

    def resume_command(self, *options: str) -> str:
        """The command that goes on here, with options."""
        return resume_command(self.path, *options, program=self.program)

    def go_on_command(self, *options: str) -> str:
        """The command that goes on with what this one does here; options replace its own."""
        return go_on_command(self.path, *options, program=self.program)

    @property
    def how_to_go_on(self) -> str:
        """What to do when the folder can be written again; before there is a run record, nothing was made."""
        return f"go on with: {self.go_on_command()}" if (self.path / RECORD).is_file() else "give the command again"

    @property
    def latents(self) -> SavedLatents:
        """The latents of the pictures that are in the making."""
        return SavedLatents(self.path / LATENTS)

    def file(self, picture: Picture) -> Path:
        """Where a picture goes."""
        return self.path / f"{picture.stem}{self.files.kind.suffix}"

    def holds(self, picture: Picture) -> bool:
        """Whether the picture is there, as a whole file that says what it was made with."""
        return self.provenance(picture) is not None

    def provenance(self, picture: Picture) -> Mapping[str, Any] | None:
        """What the picture says that it was made with; `None` if it is not there as a whole file."""
        return read_provenance(self.file(picture))

    def is_as_asked(self, picture: Picture) -> bool:
        """Whether the picture is there, as a whole file that was written as this run writes files."""
        provenance = self.provenance(picture)
        return provenance is not None and self.files.made(provenance, self.decoding)

    def saved(self, picture: Picture, stage: str) -> tuple[Tensor, int] | None:
        """Latents of the stage `draft` or `refine`, and the steps that led to them; `None` if there are none."""
        return self.latents.load(f"{picture.stem}.{stage}", self.digest(picture, stage))

    def finished(self, picture: Picture, stage: str, steps: int) -> Tensor | None:
        """Latents behind all `steps` of the stage `draft` or `refine`; `None` if they are not there."""
        saved = self.saved(picture, stage)
        return saved[0] if saved is not None and saved[1] == steps else None

    def save(self, picture: Picture, stage: str, latents: Tensor, step: int) -> None:
        """Save the latents that so many steps of the stage `draft` or `refine` led to.

        Raises:
            UserError: They cannot be written.
        """
        with writing(self):
            self.latents.save(f"{picture.stem}.{stage}", latents, step, self.digest(picture, stage))

    def draft_file(self, picture: Picture) -> Path:
        """Where a preview of its draft goes."""
        return self.path / DRAFTS / f"{picture.stem}.png"

    def clear(self, pictures: Sequence[Picture]) -> None:
        """Remove the pictures of earlier runs, before these, which are all of the run, are made.

        What processes of the same run made is left while it is not finished: they may have begun earlier.

        Raises:
            UserError: A picture is too large for the format; or the folder cannot be written, or has no locks.
        """
        self._check_sizes(pictures)
        made = [self.digest(picture) for picture in pictures]
        job = fingerprint({"how": [asdict(self.files), asdict(self.decoding)], "commit": commit()}, " ".join(made), 0)
        with writing(self):
            self.path.mkdir(parents=True, exist_ok=True)
            clear_once(self.path, job, (self.path / FINISHED).is_file, self.remove_earlier)

    def pending(self, pictures: Sequence[Picture], goes_on: bool = False, rewrites: bool = False) -> list[Picture]:
        """The pictures that are not there yet.

        Args:
            goes_on: A finished run is what the folder may hold.
            rewrites: Files that were written in another way than this run's count as missing; else they stay, and a
                warning says so.

        Raises:
            UserError: The folder holds a finished run, or pictures or latents of another one; or the disk is too small
                for what is missing; or a picture is too large for the format.
        """
        self._check_sizes(pictures)
        remedy = "choose another folder (output=...), or give overwrite=true"
        if (self.path / FINISHED).is_file() and not goes_on:
            raise UserError(f"{self.path} holds a finished run already: {remedy}")
        remedy = f"go back to those, {remedy}, which removes what is there"
        missing, written_otherwise = [], []
        for picture in pictures:
            provenance = self.provenance(picture)
            if provenance is None:
                missing.append(picture)
                if (latents := self._foreign_latents(picture)) is not None:
                    raise UserError(f"{latents} are steps of other settings or another prompt: {remedy}")
            elif provenance.get("fingerprint") != self.digest(picture):
                raise UserError(f"{self.file(picture)} was made with other settings or another prompt: {remedy}")
            elif not self.files.made(provenance, self.decoding):
                written_otherwise.append(picture)
        if rewrites:
            missing = [picture for picture in pictures if picture in (*missing, *written_otherwise)]
        elif written_otherwise:
            log.warning("%s", self.left_as_they_are(written_otherwise))
        check_space(self, missing, self.how_to_go_on if goes_on else "give the command again")
        return missing

    def left_as_they_are(self, pictures: Sequence[Picture]) -> str:
        """Says of pictures that their files, which were written in another way, are not written anew, and what does."""
        options, numbers = self.files.options(self.decoding), ", ".join(str(picture.index) for picture in pictures)
        remedy = "latents were not kept: make all pictures", "overwrite=true"
        if all(self.latents.file(f"{picture.stem}.refine").is_file() for picture in pictures):
            remedy = "latents are there: decode them", "stage=decode"
        return (
            f"files of other than {' '.join(options)} stay as they are, of the pictures {numbers}. Their {remedy[0]} "
            f"anew with: {self.resume_command(remedy[1], *options)}"
        )

    def keep(self, picture: Picture, bands: Iterable[Tensor], cost: StageCost, decoding: Decoding) -> None:
        """Write a picture of bands `[3, rows, W]` in [0, 1] with everything that it was made with.

        Args:
            decoding: How it is decoded.

        Raises:
            UserError: It cannot be written, such as on a full disk, or is not finite.
        """

        def provenance() -> dict[str, Any]:
            return {
                **asdict(picture),
                "settings": dict(self.settings),
                "fingerprint": self.digest(picture),
                "config": self.config,
                "versions": versions(),
                "commit": commit(),
                "machine": machine(),
                "seconds": cost.seconds,
                "peak_bytes": cost.peak_bytes,
                **self.files.record(decoding),
            }

        try:
            with writing(self):
                write_picture(
                    self.file(picture), bands, picture.height, picture.width, provenance, self.files.kind,
                    self.files.quality,
                )  # fmt: skip
        except NotFiniteError as error:
            raise self.not_finite(picture) from error

    def not_finite(self, picture: Picture) -> UserError:
        """Says why a picture is not written."""
        return UserError(
            f"picture {picture.index} holds NaN or infinity, so it is not written: numbers were too large for "
            f"{self.settings.get('dtype', 'the dtype')}; use dtype=bfloat16 or dtype=float32, or another LoRA"
        )

    def finish(self, pictures: Sequence[Picture]) -> Path:
        """Write the list of those of the pictures that are there, which says that the run is finished."""
        for partial in (*self.path.glob(f".{PICTURES}.part"), *self.path.glob(f"{LATENTS}/.{PICTURES}.part")):
            partial.unlink(missing_ok=True)  # of a process that was killed while it wrote
        lines = []
        for picture in pictures:
            provenance = self.provenance(picture)
            if provenance is None:
                continue
            seconds = sum(provenance.get("seconds", {}).values())
            entry = {"file": self.file(picture).name, **asdict(picture), "seconds": round(seconds, 3)}
            unsaid = ("index",) if picture.window_prompts else ("index", "window_prompts")
            entry = {name: value for name, value in entry.items() if name not in unsaid}
            lines.append(json.dumps(entry, ensure_ascii=False))
        with writing(self):
            write_atomically(self.path / FINISHED, "\n".join(lines) + "\n")
        return self.path / FINISHED

    def digest(self, picture: Picture, stage: str = "refine") -> str:
        """Digest of everything that decides the latents of the stage `draft` or `refine`.

        What the picture's file shows is decided by the latter, but for the way in which it is decoded.
        """
        settings = self._without("decode_tile")
        if stage == "draft":
            picture, settings = replace(picture, window_prompts=()), self._without(*OF_REFINEMENT) | {"method": None}
        own = asdict(picture)
        del own["index"], own["prompt"], own["seed"]
        return fingerprint({**settings, **own}, picture.prompt, picture.seed)

    def _foreign_latents(self, picture: Picture) -> Path | None:
        """Saved latents of the picture or its draft that another run would go on from."""
        for stage in ("draft", "refine"):
            if self.latents.are_foreign(name := f"{picture.stem}.{stage}", self.digest(picture, stage)):
                return self.latents.file(name)
        return None

    def _without(self, *names: str) -> dict[str, Any]:
        """The settings without some of the sampling's."""
        sampling = {name: value for name, value in self.settings.get("sampling", {}).items() if name not in names}
        return {**self.settings, "sampling": sampling}

    def remove_earlier(self) -> None:
        """What lies in the folder afterwards is one run's; files of other names are left alone."""
        ours = (self.path.glob(PICTURES), *(self.path.glob(f"{folder}/{PICTURES}") for folder in (LATENTS, DRAFTS)))
        suffixes = {*(kind.suffix for kind in FORMATS.values()), ".json", ".safetensors", ".sha256"}
        found = [file for files in ours for file in files if file.suffix in suffixes]
        for file in (*(self.path / name for name in (FINISHED, SHEET, SHEET_LIST)), *found):
            file.unlink(missing_ok=True)

    def _check_sizes(self, pictures: Sequence[Picture]) -> None:
        for picture in pictures:
            self.files.kind.check_size(picture.height, picture.width)
