"""The progress bar, with the time left; plain lines where there is no terminal."""

from __future__ import annotations

import logging
import time
from datetime import timedelta
from typing import Any

import lightning
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console

log = logging.getLogger(__name__)


class TrainingProgress(RichProgressBar):
    """A bar over all steps in a terminal; elsewhere a line now and then, with loss, speed and time left.

    Args:
        line_seconds: Least seconds between two lines.
    """

    def __init__(self, line_seconds: float = 30.0):
        self.terminal = Console().is_terminal
        super().__init__(refresh_rate=10 if self.terminal else 0, leave=True)
        self.line_seconds = line_seconds
        self._first: tuple[int, float] | None = None
        self._written = 0.0

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training"

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Move the bar, or write a line."""
        super().on_train_batch_end(trainer, pl_module, *args, **kwargs)
        now, step = time.monotonic(), trainer.global_step
        if self._first is None:
            # The first step of a run takes longer than the others.
            self._first, self._written = (step, now), now
        elif not self.terminal and trainer.is_global_zero and now - self._written >= self.line_seconds:
            self._written = now
            log.info("%s", self._line(trainer, pl_module, now))

    def _line(self, trainer: lightning.Trainer, module: lightning.LightningModule, now: float) -> str:
        assert self._first is not None
        step, speed = trainer.global_step, (trainer.global_step - self._first[0]) / (now - self._first[1])
        values = [f"{name} {value:.4g}" for name, value in self.get_metrics(trainer, module).items() if name != "v_num"]
        if trainer.max_steps <= 0:
            return ", ".join([f"step {step}", *values, f"{speed:.2f} steps/s"])
        left = timedelta(seconds=round((trainer.max_steps - step) / speed)) if speed > 0 else "unknown"
        return ", ".join([f"step {step} of {trainer.max_steps}", *values, f"{speed:.2f} steps/s", f"{left} left"])
