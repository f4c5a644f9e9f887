"""End a run when its time is spent."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import lightning
from lightning.pytorch.callbacks import Timer


class TimeLimit(Timer):
    """Lightning's `Timer`, whose ranks agree on the time every few steps instead of after each.

    Agreeing waits for the GPU, which would then run idle at the beginning of every step.

    Args:
        duration: As for `Trainer(max_time=...)`, whose own timer this one replaces; `None` is no limit.
        every_n_steps: Steps from one look at the clock to the next.
    """

    def __init__(self, duration: str | timedelta | dict[str, int] | None = None, every_n_steps: int = 20):
        super().__init__(duration, verbose=False)
        self.every_n_steps = every_n_steps

    def on_train_batch_end(self, trainer: lightning.Trainer, *args: Any, **kwargs: Any) -> None:
        """Look at the clock now and then."""
        if trainer.global_step % self.every_n_steps == 0:
            super().on_train_batch_end(trainer, *args, **kwargs)
