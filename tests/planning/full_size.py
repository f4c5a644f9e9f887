"""FLUX.1 of full size without weights, as the memory study has it."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from scale_dit.models.random_weights import on_meta
from scale_dit.models.shapes import shape_of
from scale_dit.planning.components import Components

STUDY = Path(__file__).resolve().parents[2] / "experiments" / "memory"


@cache
def study(name: str) -> ModuleType:
    """A file of the memory study."""
    spec = importlib.util.spec_from_file_location(f"memory_{name}", STUDY / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def flux1_dev(blocks: tuple[int, int] = (19, 38)) -> Components:
    """FLUX.1-dev in bfloat16 on `meta`, with so many double and single blocks."""
    sizes = {"num_layers": blocks[0], "num_single_layers": blocks[1]}
    parts = on_meta(shape_of("flux1_dev", "full"), **sizes)
    return Components({name: nn.Module.to(part, torch.bfloat16) for name, part in parts.items()})
