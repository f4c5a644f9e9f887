"""Everything that the pictures of a run share, and loading it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from scale_dit.autoencoder import Decoding
from scale_dit.data.cache_store import file_fingerprint, weights_fingerprint
from scale_dit.generation.loras import Loras
from scale_dit.generation.photo import DraftPhoto
from scale_dit.generation.pictures import Picture, Sampling
from scale_dit.generation.remake import Remake
from scale_dit.method import Method
from scale_dit.models.settings import BaseSettings
from scale_dit.models.single_file import check_transformer_file
from scale_dit.pipeline import ScaleDiTPipeline
from scale_dit.planning.memory import Memory
from scale_dit.planning.run import RunPlan
from scale_dit.recipe import Recipe

WEIGHTS = ("transformer", "vae", "text_encoder", "text_encoder_2")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setup:
    """What a run is made with, before any of it is loaded; see `scale_dit.generation.generate`."""

    base: BaseSettings
    method: Method
    sampling: Sampling
    loras: Loras
    photo: DraftPhoto | None
    backend: str
    device: torch.device
    dtype: torch.dtype
    memory: Memory
    remake: Remake | None = None

    def __post_init__(self) -> None:
        if self.memory.decode != "auto":
            _ = self.decoding  # says what cannot be

    @property
    def decoding(self) -> Decoding:
        """How pictures are decoded."""
        tile = self.sampling.decode_tile
        return Decoding(self.memory.decode, tile, tile // 4, self.sampling.wrap)

    def recipe(self, picture: Picture) -> Recipe:
        """How a picture is made."""
        return self.sampling.recipe(self.base, self.method, picture.height, picture.width)

    def settings(self) -> dict[str, Any]:
        """All that decides what pictures look like, as plain values.

        Raises:
            UserError: A LoRA or the transformer's file cannot be read, or a LoRA is another base's.
        """
        check_transformer_file(self.base.transformer_file)
        found: dict[str, Any] = {name: asdict(getattr(self, name)) for name in ("base", "method", "sampling")}
        weights = weights_fingerprint(self.base.path, WEIGHTS) if Path(self.base.path).is_dir() else None
        found |= {"dtype": str(self.dtype), "weights": weights, **self.loras.settings(self.base)}
        if self.base.transformer_file is not None:
            found["transformer_file"] = file_fingerprint(self.base.transformer_file)
        if self.memory.weights != "native":
            found["stored_weights"] = self.memory.weights
        if self.photo is not None:
            found["draft"] = self.photo.digest
        if self.remake is not None:
            found["remake"] = self.remake.settings(found)
        return found

    def warn_of_unread_draft(self) -> None:
        """Say so if nothing makes pictures follow their drafts."""
        if self.loras.own is None and self.method.guidance and self.sampling.start == 1.0:
            log.warning(
                "there is no LoRA that teaches %s to read the draft, so every window will draw the prompt for itself: "
                "give lora.path=..., or begin with the draft, such as start=0.7",
                self.base.name,
            )

    def plan(self, pictures: Sequence[Picture], drafts_only: bool = False) -> RunPlan:
        """How the pictures are made, or their drafts alone, and what that takes.

        Raises:
            UserError: The largest does not fit.
        """
        return RunPlan(
            pictures, self.base, self.method, self.sampling, self.memory, self.backend, self.device, self.dtype,
            self.remake, drafts_only, self.encoded,
        )  # fmt: skip

    def encoded(self, picture: Picture) -> list[tuple[int, int]] | None:
        """At which sizes (height, width) in px pictures that are there are encoded instead of a draft being made.

        `None`: the base makes it.
        """
        if self.photo is not None:
            return self.photo.encoded_sizes(self.recipe(picture))
        if self.remake is not None:
            return self.remake.encoded_sizes(self.recipe(picture), self._kept)
        return None

    @cached_property
    def _kept(self) -> Mapping[str, bool]:
        """What is kept of the picture that is made anew."""
        return self.settings()["remake"]["kept"]

    def load(self, plan: RunPlan, texts: Sequence[str] = ()) -> ScaleDiTPipeline:
        """The pipeline, brought to the device as planned; `texts` are encoded beside those of the pictures."""
        pipeline = ScaleDiTPipeline.from_pretrained(self.base.path, settings=self.base, dtype=self.dtype)
        self._configure(pipeline)
        self.loras.load(pipeline)
        plan.prepare(pipeline, texts)
        return pipeline

    def load_decoder(self) -> ScaleDiTPipeline:
        """A pipeline on the device of which nothing but the autoencoder was read."""
        absent = dict.fromkeys(("transformer", "text_encoder", "text_encoder_2"))
        base = replace(self.base, transformer_file=None)
        pipeline = ScaleDiTPipeline.from_pretrained(base.path, settings=base, dtype=self.dtype, **absent)
        self._configure(pipeline)
        pipeline.to(self.device)
        return pipeline

    def _configure(self, pipeline: ScaleDiTPipeline) -> None:
        pipeline.configure(self.base, self.backend)
        pipeline.method, pipeline.decoding = self.method, self.decoding
