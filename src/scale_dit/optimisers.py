"""Optimisers and learning-rate schedules by name."""

from __future__ import annotations

import math
from collections.abc import Iterable

import lightning
import torch
from lightning.pytorch.callbacks import Timer
from torch import Tensor

from scale_dit.errors import UserError

OPTIMISERS = ("adamw", "prodigy")


def check_optimiser(name: str) -> None:
    """Refuse a name that is none.

    Raises:
        UserError: Unknown name.
    """
    if name not in OPTIMISERS:
        raise UserError(f"optimiser {name!r} is unknown; choose one of {', '.join(OPTIMISERS)} (model.optimiser=adamw)")


def build_optimiser(
    name: str, parameters: Iterable[torch.nn.Parameter], learning_rate: float, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """An optimiser over `parameters`.

    Args:
        name: `adamw`, or `prodigy` (Mishchenko and Defazio 2023), whose learning rate is a multiplier, usually 1.

    Raises:
        UserError: Unknown name.
    """
    check_optimiser(name)
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=weight_decay)
    from prodigyopt import Prodigy

    return Prodigy(
        parameters, lr=learning_rate, weight_decay=weight_decay, use_bias_correction=True, safeguard_warmup=True
    )


class BudgetCosine(torch.optim.lr_scheduler.LRScheduler):
    """Linear warm-up, then a cosine down to `floor` times the peak when the trainer's budget is spent.

    The budget is `max_steps` or `max_time`, whichever comes first, so that a run limited by time ends with a small
    learning rate too. Elapsed time is agreed among ranks, now and then, since their rates must not differ.
    """

    def __init__(self, optimiser: torch.optim.Optimizer, trainer: lightning.Trainer, warmup: int, floor: float = 0.02):
        self.trainer, self.floor = trainer, floor
        self.warmup = min(warmup, max(1, trainer.max_steps // 10)) if trainer.max_steps > 0 else warmup
        self.time_progress = 0.0
        super().__init__(optimiser)

    def get_lr(self) -> list[float | Tensor]:
        """Learning rates of the current step."""
        return [base * self._factor() for base in self.base_lrs]

    def _factor(self) -> float:
        step = self.last_epoch
        if step < self.warmup:
            return (step + 1) / self.warmup
        limit = self.trainer.max_steps
        step_progress = (step - self.warmup) / max(1, limit - self.warmup) if limit > 0 else 0.0
        progress = min(1.0, max(step_progress, self._elapsed_share(step)))
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress))

    def _elapsed_share(self, step: int) -> float:
        timers = [callback for callback in self.trainer.callbacks if isinstance(callback, Timer)]
        if timers and step % 20 == 0:
            elapsed, remaining = timers[0].time_elapsed("train"), timers[0].time_remaining("train")
            share = elapsed / max(1e-9, elapsed + remaining) if remaining is not None else 0.0
            self.time_progress = self.trainer.strategy.broadcast(share)
        return self.time_progress

    def state_dict(self) -> dict[str, object]:
        """Plain numbers only; the trainer and the optimiser are given anew on resuming."""
        return {"last_epoch": self.last_epoch, "base_lrs": self.base_lrs, "time_progress": self.time_progress}


def warmup_cosine(optimiser: torch.optim.Optimizer, trainer: lightning.Trainer, warmup: int) -> dict[str, object]:
    """`BudgetCosine` in the form that `configure_optimizers` returns."""
    scheduler = BudgetCosine(optimiser, trainer, warmup)
    return {"optimizer": optimiser, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
