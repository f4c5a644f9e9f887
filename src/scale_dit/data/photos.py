"""Photographs as a torch dataset: readable pictures only, cut to the base's size, with captions."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from scale_dit.data.crops import Crops
from scale_dit.data.decode import PictureError, open_picture, to_rgb, upright_size
from scale_dit.data.probe import probe_photos
from scale_dit.data.sources import PhotoSource, Skipped, open_photos
from scale_dit.errors import UserError

__all__ = ["BrokenPhoto", "PhotoDataset", "Skipped", "collate_photos", "open_photos"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BrokenPhoto:
    """Stands in for a picture that broke after it had been probed; `collate_photos` takes it out of the batch."""

    name: str
    reason: str
    size: tuple[int, int]


class PhotoDataset(Dataset[dict[str, Any] | BrokenPhoto]):
    """Cuts out of photographs, each from (seed, epoch, index) alone.

    Pictures that cannot be read or are too small are named in a warning, left out and listed in `skipped`; no other
    takes their place. Indices count the usable pictures. `dataset[i]` is
    `{"image": [3, H, W] float32 in [0, 1], "caption": str, "name": str}`, or a `BrokenPhoto`.

    Args:
        source: from `open_photos`.
        crops: where and how large to cut.
        seed: of the cuts.
        probe_store: folder for the list of readable pictures; default below the user's cache folder.
        threads: that read pictures when the list is made.

    Attributes:
        bucket_of: index into `crops.sizes` of each picture, for `BucketBatchSampler`.
        skipped: pictures left out so far; `note_skipped` adds those that broke later.

    Raises:
        UserError: if no picture is usable.
    """

    def __init__(
        self,
        source: PhotoSource,
        crops: Crops | None = None,
        seed: int = 0,
        probe_store: str | Path | None = None,
        threads: int = 4,
    ) -> None:
        self.source = source
        self.crops = crops or Crops()
        self.seed = seed
        self.skipped: list[Skipped] = list(source.skipped)
        self.bucket_of: list[int] = []
        self._rows: list[int] = []
        # Shared memory: workers that live on between epochs see the new number too.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._index(probe_photos(source, None if probe_store is None else Path(probe_store), threads))

    def _index(self, probes: Sequence[Any]) -> None:
        for row, probe in enumerate(probes):
            try:
                if probe.problem is not None:
                    raise PictureError(probe.problem)
                bucket = self.crops.bucket(probe.height, probe.width)
            except PictureError as error:
                self.skipped.append(Skipped(self.source.names[row], str(error)))
                log.warning("skipped %s", self.skipped[-1])
            else:
                self._rows.append(row)
                self.bucket_of.append(bucket)
        if not self._rows:
            raise UserError(f"none of the {len(self.source)} pictures in {self.source.root} is usable: {self.report()}")
        if self.skipped:
            log.warning(self.report())

    def __len__(self) -> int:
        return len(self._rows)

    def set_epoch(self, epoch: int) -> None:
        """Draw other cuts in this epoch; reaches running workers."""
        self._epoch.fill_(epoch)

    @property
    def epoch(self) -> int:
        """The epoch whose cuts are drawn."""
        return int(self._epoch)

    def __getitem__(self, index: int) -> dict[str, Any] | BrokenPhoto:
        row = self._rows[index]
        name = self.source.names[row]
        bucket = self.bucket_of[index]
        random = np.random.default_rng((self.seed, self.epoch, row))
        try:
            image = self._cut(row, bucket, random)
        except PictureError as error:
            return BrokenPhoto(name, str(error), self.crops.sizes[bucket])
        return {"image": image, "caption": self.source.captions[row], "name": name}

    def _cut(self, row: int, bucket: int, random: np.random.Generator) -> Tensor:
        with open_picture(self.source.data(row)) as image:
            height, width = upright_size(image)
            box = self.crops.box(height, width, bucket, random)
            return to_rgb(image, box, self.crops.sizes[bucket])

    def note_skipped(self, skipped: Sequence[Skipped]) -> None:
        """Count pictures that broke after probing: give it each batch's `skipped`. Each is named once."""
        known = {item.name for item in self.skipped}
        for item in skipped:
            if item.name not in known:
                known.add(item.name)
                self.skipped.append(item)
                log.warning("skipped %s", item)

    def report(self) -> str:
        """How many pictures were left out, and each of them by name."""
        lines = [f"{len(self.skipped)} of {len(self.source) + len(self.source.skipped)} pictures skipped"]
        return "\n  ".join(lines + [str(item) for item in self.skipped])

    def description(self) -> dict[str, Any]:
        """Plain values that decide what `dataset[i]` is, for a cache's fingerprint."""
        return {
            "kind": self.source.kind,
            "listing": self.source.listing(),
            "pictures": len(self),
            "seed": self.seed,
            "crops": self.crops.description(),
        }


def collate_photos(items: Sequence[dict[str, Any] | BrokenPhoto]) -> dict[str, Any]:
    """Make a batch of what is whole.

    Returns:
        `{"image": [B, 3, H, W], "caption": list[str], "name": list[str], "skipped": list[Skipped]}`; B is smaller by
        the broken ones, and 0 if all are.
    """
    whole = [item for item in items if not isinstance(item, BrokenPhoto)]
    broken = [item for item in items if isinstance(item, BrokenPhoto)]
    images = torch.stack([item["image"] for item in whole]) if whole else torch.empty(0, 3, *broken[0].size)
    return {
        "image": images,
        "caption": [item["caption"] for item in whole],
        "name": [item["name"] for item in whole],
        "skipped": [Skipped(item.name, item.reason) for item in broken],
    }
