"""The LoRAs of a run: the base's own, which acts where it was trained to, and styles, which act on all tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scale_dit.lora import check_record, file_digest, has_record, read_lora
from scale_dit.lora_exchange import StyleLora, read_foreign_lora
from scale_dit.lora_fit import check_fit, check_own_fit
from scale_dit.models import load_family
from scale_dit.models.settings import BaseSettings
from scale_dit.pipeline import ScaleDiTPipeline
from scale_dit.planning.components import transformer_on_meta


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

    def check(self, base: BaseSettings) -> None:
        """See that the files fit the base, from its configs alone.

        Raises:
            UserError: One cannot be read, is another base's, or sits on layers that the base lacks.
        """
        if self.own is None and not self.styles:
            return
        layers, transformer = load_family(base).authors_layers, transformer_on_meta(base)
        if self.own is not None and (has_record(self.own) or self.own_base is None):
            tensors, record = read_lora(self.own)
            check_record(record, base.name, {})
            check_own_fit(transformer, tensors, int(record["rank"]), f"LoRA file {self.own}")
        elif self.own is not None:
            check_record({"base": self.own_base}, base.name, {})
            check_fit(transformer, read_foreign_lora(self.own, layers, tell=False), f"LoRA file {self.own}")
        for style in self.styles:
            check_fit(transformer, read_foreign_lora(style.path, layers, tell=False), f"LoRA file {style.path}")

    def settings(self, base: BaseSettings) -> dict[str, Any]:
        """Digests and weights, after the files were seen to fit the base.

        Raises:
            UserError: See `check`.
        """
        self.check(base)
        return {
            "lora": None if self.own is None else file_digest(self.own),
            "style_loras": [[file_digest(style.path), style.weight] for style in self.styles],
        }

    def load(self, pipeline: ScaleDiTPipeline) -> None:
        """Put them on."""
        if self.own is not None:
            pipeline.load_lora_weights(self.own, base=self.own_base)
        for style in self.styles:
            pipeline.load_lora_weights(style.path, style.adapter, weight=style.weight)
