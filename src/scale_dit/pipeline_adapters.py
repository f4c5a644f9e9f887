"""A pipeline's LoRAs by name: Scale-DiT's on the draft's tokens, users' own on all of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scale_dit.errors import UserError
from scale_dit.lora import ADAPTER, LoraSettings, check_record, has_record, load_lora, read_lora, remove_lora
from scale_dit.lora_exchange import StyleLora, add_foreign_lora, read_foreign_lora, set_weight
from scale_dit.lora_fit import check_fit, check_own_fit
from scale_dit.method import Method
from scale_dit.models.driver import Driver

log = logging.getLogger(__name__)


class Adapters:
    """Load, weigh and remove LoRAs, as users of diffusers expect it.

    Attributes:
        scopes: Name of each adapter -> where it acts: `guidance`, or `all`.
        adapter_weights: Of those that act.
        lora_settings, lora_record, lora_path: Of Scale-DiT's LoRA, if there is one.
    """

    base: Driver
    method: Method
    transformer: Any

    def _no_adapters(self) -> None:
        self.scopes: dict[str, str] = {}
        self.adapter_weights: dict[str, float] = {}
        self.lora_settings: LoraSettings | None = None
        self.lora_record: dict[str, Any] = {}
        self.lora_path: str | None = None

    def _adopt_adapters(self) -> None:
        """Know the adapters that a base came with."""
        everywhere = self.base.image_adapters
        self.scopes = {name: "all" if name in everywhere else "guidance" for name in self.base.guidance_adapters}

    def load_lora_weights(
        self, path: str | Path, adapter_name: str | None = None, *, weight: float = 1.0, base: str | None = None
    ) -> None:
        """Load a LoRA.

        One that this project has trained is Scale-DiT's: it acts where its own scope says, and replaces the one that
        was there. So does one by others for which `base` is given (the paper's own code writes such files), on the
        draft's tokens. Any other is a style: it acts on all tokens in every pass, beside those that are there.

        Args:
            path: File, or folder with one; names of diffusers, peft or kohya.
            adapter_name: Of a style; needed, since without it a file by others could be either. Scale-DiT's own has a
                name already.
            weight: Factor on its update.
            base: Name of the base that a Scale-DiT LoRA by others was trained for.

        Raises:
            UserError: It is missing, broken, of another base or family, and what was there stays; or it cannot be told
                to be a style or not.
        """
        if adapter_name not in (None, ADAPTER) and (base is not None or has_record(path)):
            log.warning("LoRA file %s is Scale-DiT's own: its name is %r, not %r", path, ADAPTER, adapter_name)
        if has_record(path):
            self._load_own(path)
            name = ADAPTER
        elif base is not None:
            self._load_given(path, base)
            name = ADAPTER
        elif adapter_name is not None:
            name = self._load_style(StyleLora(str(path), weight, adapter_name))
        else:
            raise UserError(
                f"LoRA file {path} was not written by Scale-DiT training (no record in its metadata). If it is a "
                f"Scale-DiT LoRA all the same, say for which base: lora.base={self.base.settings.name} "
                f"(base={self.base.settings.name!r} in Python). If it is a style, list it in style_loras (give it an "
                f"adapter_name in Python). Else train one with src/train.py."
            )
        weights = {other: self.adapter_weights.get(other, 1.0) for other in self.get_active_adapters()} | {name: weight}
        self.set_adapters(list(weights), list(weights.values()))

    def _load_own(self, path: str | Path) -> None:
        tensors, record = read_lora(path)
        method = {key: value for key, value in self.method.summary.items() if key != "scale"}  # a call has its own
        for difference in check_record(record, self.base.settings.name, method):
            log.warning("%s", difference)
        # One that does not fit must not cost the one that is there.
        check_own_fit(self.transformer, tensors, int(record["rank"]), f"LoRA file {path}")
        self.delete_adapters(ADAPTER)
        self.lora_settings, self.lora_record = load_lora(self.transformer, path)
        self.lora_path = str(path)
        self.scopes[ADAPTER] = self.lora_settings.scope

    def _load_given(self, path: str | Path, base: str) -> None:
        check_record({"base": base}, self.base.settings.name, {})
        tensors = read_foreign_lora(path, self.base.authors_layers)
        check_fit(self.transformer, tensors, f"LoRA file {path}")
        self.delete_adapters(ADAPTER)
        count = add_foreign_lora(self.transformer, tensors, f"LoRA file {path}", ADAPTER)
        log.warning(
            "LoRA file %s does not say what it was trained for; it is taken as one of base %s, for the draft's tokens, "
            "on %d layers", path, base, count,
        )  # fmt: skip
        self.lora_path, self.scopes[ADAPTER] = str(path), "guidance"

    def _load_style(self, style: StyleLora) -> str:
        tensors = read_foreign_lora(style.path, self.base.authors_layers)
        count = add_foreign_lora(self.transformer, tensors, f"LoRA file {style.path}", style.adapter)
        log.info("style %s acts on %d layers, for all tokens", style.adapter, count)
        self.scopes[style.adapter] = "all"
        return style.adapter

    def get_active_adapters(self) -> list[str]:
        """Names of the adapters that act."""
        return list(self.base.guidance_adapters)

    def set_adapters(self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] = 1.0) -> None:
        """Let these adapters act, with these weights, and no others.

        Raises:
            UserError: A name that is not loaded, or not as many weights as names.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(dict.fromkeys(adapter_names))
        weights = [adapter_weights] * len(names) if isinstance(adapter_weights, int | float) else list(adapter_weights)
        if unknown := [name for name in names if name not in self.scopes]:
            raise UserError(f"no LoRA is named {unknown[0]!r}; there are {', '.join(self.scopes) or 'none'}")
        if len(weights) != len(names):
            raise UserError(f"{len(weights)} weights were given for {len(names)} adapters: give one each")
        for name, weight in zip(names, weights, strict=True):
            set_weight(self.transformer, name, weight)
        self.adapter_weights = dict(zip(names, weights, strict=True))
        self.base.guidance_adapters = tuple(names)
        self.base.image_adapters = tuple(name for name in names if self.scopes[name] == "all")

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Remove adapters; names that are not loaded are none."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for name in names:
            if self.scopes.pop(name, None) is not None:
                remove_lora(self.transformer, name)
        if ADAPTER in names:
            self.lora_settings, self.lora_record, self.lora_path = None, {}, None
        base = self.base
        base.guidance_adapters = tuple(name for name in base.guidance_adapters if name in self.scopes)
        base.image_adapters = tuple(name for name in base.image_adapters if name in self.scopes)

    def unload_lora_weights(self) -> None:
        """Remove all adapters, also those that the base came with."""
        self.delete_adapters(list(self.scopes))
