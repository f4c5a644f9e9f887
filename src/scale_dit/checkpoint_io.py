"""Checkpoint files that are whole or not there, whatever happens while they are written."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from scale_dit.errors import UserError
from scale_dit.files import write_atomically


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the old file and replaces it only when the new one is complete on the disk.

    Lightning's own goes through the folder for temporary files, which may be on another disk; then a full disk leaves
    a truncated file in place of the last good one.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write the checkpoint.

        Raises:
            OSError: No room, or no permission; the old file stays.
        """
        content = io.BytesIO()
        torch.save(checkpoint, content)
        write_atomically(Path(path), content.getbuffer())

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable | None = lambda storage, _: storage,
        weights_only: bool | None = True,
    ) -> dict[str, Any]:
        """Read a checkpoint of plain values and tensors.

        Raises:
            UserError: It is not there, truncated, or no checkpoint.
        """
        return read_checkpoint(path, map_location)


def read_checkpoint(path: str | Path, map_location: Callable | str | None = "cpu") -> dict[str, Any]:
    """Read a checkpoint of plain values and tensors.

    Raises:
        UserError: It is not there, truncated, or no checkpoint.
    """
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"the checkpoint {path} does not exist; give a .ckpt file that training wrote") from error
    except (RuntimeError, EOFError, pickle.UnpicklingError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"the checkpoint {path} cannot be read, it is truncated or no checkpoint ({reason})") from error
    if not isinstance(checkpoint, dict) or "global_step" not in checkpoint:
        raise UserError(f"{path} is no checkpoint of a training run: it holds no step count")
    return checkpoint
