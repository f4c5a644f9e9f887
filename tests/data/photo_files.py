"""Helpers for tests on photographs."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from scale_dit.data.crops import Crops
from scale_dit.data.photos import PhotoDataset, open_photos


def dataset_of(path: Path, crops: Crops | None = None, **options: object) -> PhotoDataset:
    source = open_photos(path, store=path.parent / "store", **options)  # type: ignore[arg-type]
    return PhotoDataset(source, crops or Crops(64, place="centre"), probe_store=path.parent / "probes")


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
