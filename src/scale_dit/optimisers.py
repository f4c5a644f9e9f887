"""Optimisers and learning-rate schedules by name."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from scale_dit.errors import UserError


def build_optimiser(
    name: str, parameters: Iterable[torch.nn.Parameter], learning_rate: float, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """An optimiser over `parameters`.

    Args:
        name: `adamw`, or `prodigy` (Mishchenko and Defazio 2023), whose learning rate is a multiplier, usually 1.

    Raises:
        UserError: Unknown name.
    """
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=weight_decay)
    if name == "prodigy":
        from prodigyopt import Prodigy

        return Prodigy(
            parameters,
            lr=learning_rate,
            weight_decay=weight_decay,
            use_bias_correction=True,
            safeguard_warmup=True,
        )
    raise UserError(f"optimiser {name!r} is unknown; choose one of adamw, prodigy (model.optimiser=adamw)")


def warmup_cosine(
    optimiser: torch.optim.Optimizer, total_steps: int, warmup: int, floor: float = 0.02
) -> dict[str, object]:
    """Linear warm-up over `warmup` steps, then a cosine down to `floor` times the peak, in Lightning's format."""
    warmup = min(warmup, max(1, total_steps // 10))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
    return {"optimizer": optimiser, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
