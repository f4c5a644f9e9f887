"""Which layers of a family's transformer get Scale-DiT's LoRA."""

from __future__ import annotations

from typing import Any

from torch import nn

TARGETS: dict[type[nn.Module], tuple[tuple[str, ...], tuple[str, ...]]] = {}
"""Kind of block -> its layers that get an adapter, and those of them that the last block's keys and values need."""


def adapt(block: type[nn.Module], layers: tuple[str, ...], keys_values: tuple[str, ...]) -> None:
    """Say which layers of a family's blocks get an adapter; names within the block."""
    TARGETS[block] = layers, keys_values


def target_modules(transformer: Any) -> list[str]:
    """Full names of the linear layers that get an adapter.

    `x_embedder`; of double blocks the image side's q, k, v, output and feed-forward; of single blocks q, k, v, MLP and
    output; and of the last block keys and values only, because nothing behind them is read.
    """
    lists = ("transformer_blocks", "single_transformer_blocks")
    blocks = [(f"{part}.{i}", block) for part in lists for i, block in enumerate(getattr(transformer, part))]
    names = ["x_embedder"]
    for name, block in blocks:
        layers, keys_values = TARGETS[type(block)]
        names += [f"{name}.{layer}" for layer in (keys_values if block is blocks[-1][1] else layers)]
    return names
