"""Where the pictures of a run go, and which of them an interrupted run need not make again."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from scale_dit.errors import UserError
from scale_dit.files import write_atomically
from scale_dit.generation.pictures import Picture
from scale_dit.picture_files import fingerprint, read_provenance, save_picture
from scale_dit.provenance import commit, machine, versions

FINISHED = "pictures.jsonl"
"""List of the pictures of a finished run, beside them; it can be given as a prompt file again."""

PICTURES = "[0-9][0-9][0-9][0-9][0-9]_seed*.png"


@dataclass(frozen=True)
class OutputFolder:
    """Where the pictures of one run go.

    Args:
        path: The folder.
        settings: What all its pictures share and what decides what they look like; plain values.
    """

    path: Path
    settings: Mapping[str, Any]

    def pending(self, pictures: Sequence[Picture], overwrite: bool = False) -> list[Picture]:
        """The pictures that are not there yet; with `overwrite` all of them, after the earlier ones were removed.

        Raises:
            UserError: The folder holds a finished run, or pictures of another one; or the disk is too small for what
                is missing.
        """
        if overwrite:
            self._remove_earlier()
        remedy = "choose another folder (output=...), or give overwrite=true"
        if (self.path / FINISHED).is_file():
            raise UserError(f"{self.path} holds a finished run already: {remedy}")
        missing = []
        for picture in pictures:
            file = self.path / picture.file_name
            provenance = read_provenance(file)
            if provenance is None:
                missing.append(picture)
            elif provenance.get("fingerprint") != self._fingerprint(picture):
                raise UserError(f"{file} was made with other settings or another prompt: {remedy}")
        self._check_space(missing)
        return missing

    def keep(self, picture: Picture, image: Tensor, cost: Mapping[str, Any]) -> None:
        """Write a picture `[3, H, W]` in [0, 1] with everything that it was made with.

        Raises:
            UserError: It cannot be written, such as on a full disk.
        """
        provenance = {
            **asdict(picture),
            "settings": dict(self.settings),
            "fingerprint": self._fingerprint(picture),
            "versions": versions(),
            "commit": commit(),
            "machine": machine(),
            **cost,
        }
        with writing(self.path):
            save_picture(image, self.path / picture.file_name, provenance)

    def finish(self, pictures: Sequence[Picture]) -> Path:
        """Write the list of the pictures, which says that the run is finished."""
        lines = []
        for picture in pictures:
            seconds = (read_provenance(self.path / picture.file_name) or {}).get("seconds", {})
            entry = {"file": picture.file_name, **asdict(picture), "seconds": round(sum(seconds.values()), 3)}
            del entry["index"]
            lines.append(json.dumps(entry, ensure_ascii=False))
        with writing(self.path):
            write_atomically(self.path / FINISHED, "\n".join(lines) + "\n")
        return self.path / FINISHED

    def _fingerprint(self, picture: Picture) -> str:
        own = {"negative_prompt": picture.negative_prompt, "height": picture.height, "width": picture.width}
        return fingerprint({**self.settings, **own}, picture.prompt, picture.seed)

    def _remove_earlier(self) -> None:
        """What lies in the folder afterwards is one run's; files of other names are left alone."""
        for file in (self.path / FINISHED, *self.path.glob(PICTURES)):
            file.unlink(missing_ok=True)

    def _check_space(self, pictures: Sequence[Picture]) -> None:
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.path).free
        needed = sum(3 * picture.height * picture.width for picture in pictures)
        if needed > free:
            raise UserError(
                f"{len(pictures)} pictures can take {needed / 2**20:,.0f} MiB, but the disk of {self.path} has "
                f"{free / 2**20:,.0f} MiB left: free some space, or choose another folder (output=...)"
            )


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what the operating system says about a file that cannot be written into one clear error.

    Raises:
        UserError: Naming the folder, the reason and how to go on.
    """
    try:
        yield
    except OSError as error:
        what = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise UserError(
            f"{folder} cannot be written: {what}. Finished pictures are kept: give the same command with "
            f"output={folder} once it can be written, or choose another folder."
        ) from error
