"""Lightning data module over photographs: cut, reduced and encoded once, then read from the latent cache."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from scale_dit.data.cache import CachedLatents, build_cache, cache_fingerprint
from scale_dit.data.cache_store import encoder_weights
from scale_dit.data.cached_pairs import CachedPairs
from scale_dit.data.crops import Crops
from scale_dit.data.photos import PhotoDataset
from scale_dit.data.progress import shown_progress
from scale_dit.data.sources import PhotoSource, open_photos
from scale_dit.errors import UserError

log = logging.getLogger(__name__)

RECORDS_PER_SHARD = 64
"""Pictures between two steps of the progress bar, and those that an interruption loses."""


class PhotoPairs(CachedPairs):
    """Photographs with their own reductions as drafts, for `ScaleDiTModule`, from a latent cache on disk.

    The first process encodes what the cache lacks and the others wait. Batches are those of `CachedPairs`; scale and
    size of the drafts are the method's.

    Args:
        path: Photographs with captions: a folder, webdataset tars or parquet files, see `open_photos`.
        cache: Folder for the latents; each combination of photographs, cuts, base and drafts has its own below it,
            and all processes must see it.
        crops: Size and place of the cuts; its size is the side that the base was trained at.
        batch_size: Pictures a step and device.
        draws: Different cuts of each photograph that are encoded.
        default_caption: For photographs without a caption ("" for none); without it they are an error.
        kind: Of the source; by default told by what is there.
        caption_field: Column or JSON field of the captions.
        image_field: Column of the pictures in parquet files.
        probe_store: Folder for the list of readable pictures; by default below the user's cache folder.
        workers: Processes that read photographs while they are encoded.
        seed: Order of the batches. The cuts do not depend on it, so that runs that differ in it share a cache.

    Raises:
        UserError: Nothing at `path`, photographs without captions, or a value that cannot be.
    """

    def __init__(
        self,
        path: str | Path | None,
        cache: str | Path,
        crops: Crops | None = None,
        batch_size: int = 16,
        draws: int = 1,
        default_caption: str | None = None,
        kind: str | None = None,
        caption_field: str | None = None,
        image_field: str | None = None,
        probe_store: str | Path | None = None,
        workers: int = 0,
        seed: int = 0,
    ):
        super().__init__(batch_size, seed)
        if path is None:
            raise UserError("there is no folder of photographs to train on: give one with data.path=<folder>")
        if draws < 1:
            raise UserError(f"draws is {draws}, but it must be at least 1 (data.draws)")
        self.path, self.cache, self.crops = Path(path).expanduser(), Path(cache).expanduser(), crops or Crops()
        self.draws, self.workers = draws, workers
        self.probe_store = probe_store
        self._source_options = {
            "kind": kind,
            "caption_field": caption_field,
            "image_field": image_field,
            "default_caption": default_caption,
        }
        # One process for all nodes, as two that write into one folder would disturb each other.
        self.prepare_data_per_node = False
        self._cache_folder: str | None = None
        self._report: str | None = None
        if not self.path.exists():
            raise UserError(f"no photographs at {self.path}: there is no such file or folder; check data.path")
        if rank_zero_only.rank == 0:
            _ = self.source  # says what is wrong with it before weights are loaded

    @cached_property
    def source(self) -> PhotoSource:
        """The photographs and their captions."""
        return open_photos(self.path, **self._source_options)

    def prepare_data(self) -> None:
        """Encode what the cache lacks, in the first process."""
        module = self.trainer.lightning_module
        for height, width in self.crops.sizes:
            module.plan_for(height, width)  # says what cannot be before anything is encoded
        dataset = PhotoDataset(self.source, self.crops, probe_store=self.probe_store)
        base, method = module.base, module.method
        device = self.trainer.strategy.root_device
        base.encoders_to(device)
        contents: dict[str, Any] = {
            "dataset": dataset,
            "base": encoders_fingerprint(base),
            "scales": (method.scale,),
            "token": base.settings.token_size,
            "max_tokens": method.guidance_tokens,
            "draws": self.draws,
        }
        folder = self.cache / digest(cache_fingerprint(**contents))
        with shown_progress("Encoding photographs") as progress:
            build_cache(
                encode_image=base.encode_images,
                encode_text=partial(base.encode_prompts, device=device),
                folder=folder,
                workers=self.workers,
                records_per_shard=RECORDS_PER_SHARD,
                progress=progress,
                **contents,
            )
        latents = CachedLatents(folder)
        log.info(
            "%d cuts of %d photographs, of %d sizes, in %s", len(latents), len(dataset), len(latents.sizes), folder
        )
        dataset.note_skipped(latents.skipped)
        self._report = dataset.report() if dataset.skipped else None
        self._cache_folder = str(folder)

    def setup(self, stage: str) -> None:
        """Open the cache that the first process has built."""
        self._cache_folder = self.trainer.strategy.broadcast(self._cache_folder)
        self.latents = CachedLatents(self._cache_folder)

    @property
    def sizes(self) -> Sequence[tuple[int, int]]:
        """(height, width) in px of the cuts."""
        return self.crops.sizes

    @property
    def content(self) -> str:
        """The folder's name is a digest of photographs, cuts, base and drafts."""
        return Path(self._cache_folder or "").name

    def teardown(self, stage: str) -> None:
        """Name the photographs that were not used, once more, where they are not lost among other lines."""
        if self._report is not None:
            log.warning(self._report)
            self._report = None


def encoders_fingerprint(base: Any) -> str:
    """Names the weights of a base's encoders and what else decides what they give."""
    dtype = str(base.dtype).removeprefix("torch.")
    return f"{encoder_weights(base.settings)}, {dtype}, {base.settings.text_length} text tokens"


def digest(fingerprint: dict[str, Any]) -> str:
    """A folder name for a cache with this content."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:16]


__all__ = ["PhotoPairs", "digest", "encoders_fingerprint"]
