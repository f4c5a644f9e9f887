"""The LoRAs of a run: the base's own, which acts where it was trained to, and styles, which act on all tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scale_dit.lora import check_record, file_digest, has_record, read_lora
from scale_dit.lora_exchange import StyleLora, read_foreign_lora
from scale_dit.models import load_family
from scale_dit.models.settings import BaseSettings
from scale_dit.pipeline import ScaleDiTPipeline


@dataclass(frozen=True)
class Loras:
    """What a base is changed by.

    Args:
        own: File or folder of the base's LoRA; `None`: none.
        own_base: Name of the base that a LoRA by others, which does not say so, was trained for.
        styles: Further LoRAs, which act on all tokens.
    """

    own: str | Path | None = None
    own_base: str | None = None
    styles: Sequence[StyleLora] = ()

    def settings(self, base: BaseSettings) -> dict[str, Any]:
        """Digests and weights, after the files were seen to be ones of this base's.

        Raises:
            UserError: One cannot be read, or is another base's.
        """
        stock = load_family(base).stock if self.styles else None
        styles = []
        for style in self.styles:
            read_foreign_lora(style.path, stock)
            styles.append([file_digest(style.path), style.weight])
        return {"lora": self._own_digest(base), "style_loras": styles}

    def load(self, pipeline: ScaleDiTPipeline) -> None:
        """Put them on."""
        if self.own is not None:
            pipeline.load_lora_weights(self.own, base=self.own_base)
        for style in self.styles:
            pipeline.load_lora_weights(style.path, style.adapter, weight=style.weight)

    def _own_digest(self, base: BaseSettings) -> str | None:
        if self.own is None:
            return None
        foreign = self.own_base is not None and not has_record(self.own)
        check_record({"base": self.own_base} if foreign else read_lora(self.own)[1], base.name, {})
        return file_digest(self.own)
