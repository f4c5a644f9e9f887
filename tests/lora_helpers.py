"""What the tests of LoRAs share: random ones for any layers, and what both passes make of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from small_bases import SETTINGS, noise, random_text
from torch import Tensor, nn

from scale_dit.lora import FILE_NAME
from scale_dit.method import Method
from scale_dit.models.driver import Driver
from scale_dit.models.flux_attention import KeysValues
from scale_dit.models.text import Text

PLAN = Method(scale=2).plan(SETTINGS, 192, 160)
TIMES = torch.tensor([0.3, 0.9871])
RECORD = {"base": "small"} | Method(scale=2).summary
RANKS = (2, 3)


def both_passes(base: Driver, text: Text | None = None) -> tuple[Tensor, Sequence[KeysValues]]:
    """Velocity of noise, and what it read of a draft."""
    text = text or random_text(2, base.transformer)
    keys_values = base.guidance_pass(noise(2, 30, 64, seed=4), text.pooled, PLAN, 3.5)
    return base.image_pass(noise(2, 120, 64), text, TIMES, PLAN, keys_values, 3.5), keys_values


def random_lora(transformer: nn.Module, modules: list[str]) -> dict[str, Tensor]:
    """Matrices for some layers by peft's names, of two ranks."""
    tensors: dict[str, Tensor] = {}
    for index, name in enumerate(modules):
        layer, rank = transformer.get_submodule(name), RANKS[index % 2]
        tensors[f"{name}.lora_A.weight"] = 0.3 * noise(rank, layer.in_features, seed=2 * index)
        tensors[f"{name}.lora_B.weight"] = 0.3 * noise(layer.out_features, rank, seed=2 * index + 1)
    return tensors


def linear_layers(transformer: nn.Module) -> list[str]:
    """Names of all layers that a LoRA can sit on."""
    return [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]


def fused(transformer: nn.Module, tensors: dict[str, Tensor], weight: float = 1.0) -> None:
    """The same update in the weights themselves."""
    for key in [key for key in tensors if ".lora_A." in key]:
        layer = transformer.get_submodule(key.rsplit(".lora_", 1)[0])
        layer.weight.data += weight * tensors[key.replace("lora_A", "lora_B")] @ tensors[key]


def velocity(base, seed: int = 0) -> Tensor:
    """What both passes make of a draft and noise."""
    width = base.transformer.config.in_channels
    plan = Method(scale=2).plan(SETTINGS, 192, 160)
    text = random_text(1, base.transformer, seed=seed)
    stored = base.guidance_pass(noise(1, 30, width, seed=4), text.pooled, plan, 1)
    return base.image_pass(noise(1, 120, width), text, torch.tensor([0.3]), plan, stored, 1)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], object]) -> None:
    """Change tensors (or the record) of a LoRA file in place."""
    path = folder / FILE_NAME
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    record = json.loads(metadata["scale_dit"])
    change(tensors, record)
    safetensors.torch.save_file(tensors, path, metadata | {"scale_dit": json.dumps(record)})
