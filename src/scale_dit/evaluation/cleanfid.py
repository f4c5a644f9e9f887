"""clean-fid (Parmar et al. 2022): FID with a resizer that does not alias, through the library's own code path."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scale_dit.evaluation.features import default_device, find_weights
from scale_dit.evaluation.metric import Figure, Record

WEIGHTS_FILE = "inception-2015-12-05.pt"
WEIGHTS_ADDRESS = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{WEIGHTS_FILE}"


class CleanFID:
    """`cleanfid.fid.compute_fid` between an arm's files and the true pictures' files.

    Args:
        weights: `inception-2015-12-05.pt` or the folder that holds it; torch hub's cache is searched too. The library
            would otherwise fetch it by itself in the middle of the evaluation.
        batch_size: pictures per network call.
        device: where it runs; a GPU if there is one, by default.
    """

    name = "clean_fid"
    needs = ("the package clean-fid", f"the weights {WEIGHTS_FILE}", "true pictures of the prompts")

    def __init__(self, weights: str | None = None, batch_size: int = 16, device: str | None = None) -> None:
        self.place = weights
        self.batch_size = batch_size
        self.device = torch.device(device) if device else default_device()
        self._pairs: dict[str, dict[int, tuple[Path, Path]]] = {}

    def available(self) -> str | None:
        """What keeps clean-fid from running: the package, its scipy, or the weights."""
        if find_spec("cleanfid") is None:
            return "clean-fid is not installed: pip install clean-fid 'scipy<1.18'"
        if _version_of("scipy") >= (1, 18):
            return f"clean-fid fails with scipy {version('scipy')}: pip install 'scipy<1.18'"
        if find_weights(WEIGHTS_FILE, self.place) is None:
            return (
                f"clean-fid's Inception weights not found. Download {WEIGHTS_ADDRESS} into "
                f"{self.place or Path(torch.hub.get_dir()) / 'checkpoints'}, or name the file or its folder as "
                "`weights` of this metric (or in the environment variable SCALE_DIT_WEIGHTS)"
            )
        return None

    @cached_property
    def network(self) -> Any:
        """clean-fid's own Inception module, loaded at first use."""
        from cleanfid.inception_torchscript import InceptionV3W

        path = find_weights(WEIGHTS_FILE, self.place)
        if path is None:
            raise FileNotFoundError(self.available())
        # The class takes a folder and appends the file's name.
        return InceptionV3W(str(path.parent), download=False, resize_inside=False).to(self.device).eval()

    def update(self, arm: str, images: Tensor, prompts: Sequence[str], records: Sequence[Record]) -> None:
        """Remember which files belong to the arm."""
        for record in records:
            if record.path is not None and record.reference_path is not None:
                self._pairs.setdefault(arm, {})[record.index] = (record.path, record.reference_path)

    def compute(self, arm: str) -> dict[str, Figure]:
        """The distance between the arm's files and the true pictures' files."""
        pairs = list(self._pairs.get(arm, {}).values())
        if len(pairs) < 2:
            return {}
        from cleanfid import fid

        # Folders of links: the output folder may hold pictures of an earlier, longer run.
        with tempfile.TemporaryDirectory() as folder:
            made, true = (_link_all([pair[i] for pair in pairs], Path(folder) / name) for i, name in enumerate("ab"))
            value = fid.compute_fid(
                str(made),
                str(true),
                mode="clean",
                num_workers=0,
                batch_size=self.batch_size,
                device=self.device,
                custom_feat_extractor=self.network,
                verbose=False,
            )
        note = f"N={len(pairs)} against as many true pictures; mode clean, no crop; clean-fid {version('clean-fid')}"
        return {self.name: Figure(float(value), n=len(pairs), note=note)}

    def per_picture(self, arm: str) -> dict[str, dict[int, float]]:
        """Empty: a distance belongs to a set."""
        return {}


def _link_all(paths: Sequence[Path], folder: Path) -> Path:
    folder.mkdir()
    for number, path in enumerate(paths):
        os.symlink(path.resolve(), folder / f"{number:06d}{path.suffix}")
    return folder


def _version_of(package: str) -> tuple[int, int]:
    major, minor = version(package).split(".")[:2]
    return int(major), int(minor)
