"""Where an evaluation keeps its pictures, and which of them an interrupted evaluation need not make again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from scale_dit.errors import UserError
from scale_dit.evaluation.metric import Record
from scale_dit.picture_files import fingerprint, load_picture, read_provenance, save_picture

MakeReference = Callable[[Sequence[Record], int, int], Tensor]
REFERENCE_FOLDER = "reference"
DRAFT_FOLDER = "drafts"


@dataclass(frozen=True)
class Store:
    """Files of one evaluation: `<folder>/<arm>/<index>_seed<seed>.png`, drafts under `<folder>/drafts/<arm>/`."""

    folder: Path
    _made: set[Path] = field(default_factory=set)

    def picture(self, arm: str, index: int, seed: int) -> Path:
        """File of a picture."""
        return self.folder / arm / f"{index:05d}_seed{seed}.png"

    def draft(self, arm: str, index: int, seed: int) -> Path:
        """File of the draft that a picture was made from."""
        return self.folder / DRAFT_FOLDER / arm / f"{index:05d}_seed{seed}.png"

    def reference(self, record: Record, height: int, width: int, make: MakeReference) -> tuple[Tensor, Path]:
        """The true picture of a record at a size, as `[3, H, W]` uint8, and its file.

        It is made once in each evaluation, not taken from an earlier one: the renderer may have changed since.
        """
        path = self.folder / REFERENCE_FOLDER / f"{height}x{width}" / f"{record.index:05d}_seed{record.seed}.png"
        if path not in self._made:
            save_picture(make([record], height, width)[0], path, {"prompt": record.prompt})
            self._made.add(path)
        return load_picture(path), path

    def any_reference(self, record: Record) -> Path | None:
        """The file of a record's true picture at whatever size was made."""
        files = sorted((self.folder / REFERENCE_FOLDER).glob(f"*/{record.index:05d}_seed{record.seed}.png"))
        return files[-1] if files else None

    def finished(self, arm: str, index: int, seed: int, prompt: str, settings: Mapping[str, Any] | None) -> bool:
        """Whether the picture lies there, whole, and made from the same prompt, seed and settings.

        Without settings nobody can know, and the answer is no.
        """
        if settings is None:
            return False
        provenance = read_provenance(self.picture(arm, index, seed))
        return provenance is not None and provenance.get("fingerprint") == fingerprint(settings, prompt, seed)

    def keep(
        self,
        arm: str,
        index: int,
        seed: int,
        prompt: str,
        image: Tensor,
        draft: Tensor | None,
        settings: Mapping[str, Any] | None,
        costs: Mapping[str, Any],
    ) -> None:
        """Write a picture with its provenance, after its draft: a picture on disk says that both are there."""
        if draft is not None:
            save_picture(draft, self.draft(arm, index, seed))
        else:
            self.draft(arm, index, seed).unlink(missing_ok=True)
        provenance = {
            "prompt": prompt,
            "seed": seed,
            "settings": dict(settings or {}),
            "fingerprint": fingerprint(settings, prompt, seed) if settings is not None else None,
            **costs,
        }
        save_picture(image, self.picture(arm, index, seed), provenance)

    def load_draft(self, arm: str, index: int, seed: int) -> Tensor | None:
        """A picture's draft `[3, h, w]` uint8, if it has one."""
        path = self.draft(arm, index, seed)
        return load_picture(path) if path.is_file() else None


def check_arm_names(names: list[str]) -> None:
    """Raises:
    UserError: there is no arm, or a name cannot be a folder beside the store's own.
    """
    if not names:
        raise UserError("there is nothing to evaluate: name at least one arm")
    for name in names:
        if name in (REFERENCE_FOLDER, DRAFT_FOLDER) or not name or any(c in name for c in "/\\ "):
            raise UserError(
                f"an arm cannot be called {name!r}: it names a folder, without spaces and slashes, and "
                f"{REFERENCE_FOLDER!r} and {DRAFT_FOLDER!r} are taken"
            )
