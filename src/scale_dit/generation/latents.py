"""Latents on disk, so that no step is lost."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from scale_dit.files import sha256_of, write_atomically

log = logging.getLogger(__name__)


class SavedLatents:
    """Latents `[B, C, h, w]` of drafts and of pictures, with the number of steps that led to them.

    Euler steps draw no noise, so latents and their step are all that going on takes.

    Args:
        folder: Where they are.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def save(self, name: str, latents: Tensor, step: int, fingerprint: str) -> None:
        """Write a file that is whole or not there.

        Args:
            fingerprint: Digest of everything that decides what the latents are.

        Raises:
            OSError: As the file system says; an older file of the name stays.
        """
        record = {"fingerprint": fingerprint, "step": str(step)}
        write_atomically(self.file(name), save({"latents": latents.detach().cpu().contiguous()}, record))

    def load(self, name: str, fingerprint: str) -> tuple[Tensor, int] | None:
        """Latents, bit by bit as they were, and their step; `None` if there are none that were made in the same way."""
        path = self.file(name)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                record = file.metadata() or {}
                if record.get("fingerprint") != fingerprint:
                    return None
                return file.get_tensor("latents").to(torch.float32), int(record["step"])
        except (SafetensorError, OSError) as error:
            log.warning("%s is damaged and is made again: %s", path, error)
            return None

    def are_foreign(self, name: str, fingerprint: str) -> bool:
        """Whether there are latents of this name that were made in another way."""
        try:
            with safe_open(self.file(name), framework="pt") as file:
                return (file.metadata() or {}).get("fingerprint") != fingerprint
        except (SafetensorError, OSError):  # none, or damaged ones, which `load` tells of
            return False

    def remove(self, name: str) -> None:
        """Forget latents that are no longer needed."""
        self.file(name).unlink(missing_ok=True)

    def tie(self, name: str, picture: Path) -> None:
        """Note a file that a picture's latents, which stay, led to: one picture can be there in several formats.

        Raises:
            OSError: As the file system says.
        """
        ties = dict.fromkeys([*self._ties(name), sha256_of(picture)])
        write_atomically(self._tie(name), "".join(f"{tie}\n" for tie in ties))

    def led_to(self, name: str, picture: Path) -> bool:
        """Whether a file is one that these latents led to: it may have been painted over since."""
        ties = self._ties(name)
        return bool(ties) and sha256_of(picture) in ties

    def _ties(self, name: str) -> list[str]:
        tie = self._tie(name)
        return tie.read_text().split() if tie.is_file() else []

    def _tie(self, name: str) -> Path:
        return self.folder / f"{name}.sha256"

    def file(self, name: str) -> Path:
        """Where the latents of this name are."""
        return self.folder / f"{name}.safetensors"
