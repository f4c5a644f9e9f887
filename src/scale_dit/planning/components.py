"""A base's parts without their weights: built from their configs on the device `meta`."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN
from torch import nn

from scale_dit.models import load_family
from scale_dit.models.settings import BaseSettings

LAYERS = (nn.Linear, nn.Conv2d, nn.Embedding)


@dataclass(frozen=True)
class Components:
    """Transformer, autoencoder and text encoders by their names in the pipeline, on `meta`."""

    modules: dict[str, nn.Module]

    @classmethod
    def of(cls, base: BaseSettings, dtype: torch.dtype) -> Components:
        """Those of a base whose configs are in a folder, in the hub's cache or on the hub: a few kilobytes each."""
        modules = {}
        for name, entry in DiffusionPipeline.load_config(base.path).items():
            if isinstance(entry, list | tuple) and entry[0] in ("diffusers", "transformers"):
                part = _build(base.path, name, *entry)
                if isinstance(part, nn.Module):
                    modules[name] = nn.Module.to(part, dtype)
        return cls(modules)

    @property
    def transformer(self) -> Any:
        """The diffusion transformer."""
        return self.modules["transformer"]

    @property
    def text_encoders(self) -> dict[str, nn.Module]:
        """Text encoders by name."""
        return {name: module for name, module in self.modules.items() if name.startswith("text_encoder")}

    def driver(self, base: BaseSettings, backend: str) -> Any:
        """The base's driver over the transformer alone."""
        parts: defaultdict[str, Any] = defaultdict(lambda: None, transformer=self.transformer)
        return load_family(base).from_components(parts, base, backend)


def transformer_on_meta(base: BaseSettings) -> Any:
    """The base's diffusion transformer alone, its family loaded; one in a file of its own has the same sizes.

    Raises:
        UserError: The base cannot be had.
    """
    base.check_weights()
    load_family(base)  # which says what a LoRA adapts
    return _build(base.path, "transformer", *DiffusionPipeline.load_config(base.path)["transformer"])


def _build(path: str, name: str, library: str, kind: str) -> Any:
    """One part, or `None` for what has no weights."""
    model = getattr(diffusers if library == "diffusers" else transformers, kind)
    if not issubclass(model, nn.Module):
        return None
    with torch.device("meta"):
        if library == "diffusers":
            return model.from_config(model.load_config(path, subfolder=name))
        return model(transformers.AutoConfig.from_pretrained(path, subfolder=name))


def size_of(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))


def blocks_of(transformer: nn.Module) -> list[nn.Module]:
    """The blocks of a transformer: what its lists hold."""
    return [block for part in transformer.children() if isinstance(part, nn.ModuleList) for block in part]


def castable(module: nn.Module, skipped: Sequence[str]) -> int:
    """Numbers in the layers that diffusers' layerwise casting stores in 8 bits.

    Args:
        skipped: Patterns of names that the model's class leaves out, beside those that diffusers always does.
    """
    return sum(
        parameter.numel()
        for name, layer in module.named_modules()
        if isinstance(layer, LAYERS)
        and not any(re.search(pattern, name) for pattern in (*DEFAULT_SKIP_MODULES_PATTERN, *skipped))
        for parameter in layer.parameters()
    )
