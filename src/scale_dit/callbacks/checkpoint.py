"""The one checkpoint of a run, written now and then, when the run is interrupted, and at its end."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Checkpoint

from scale_dit.errors import Interrupted, UserError
from scale_dit.run_folder import LAST

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STEPS_TO_AGREE = 10


class LastCheckpoint(Checkpoint):
    """Keeps `checkpoints/last.ckpt` in the run's folder, never one with weights that are not finite.

    The first Ctrl-C or SIGTERM lets the running step end (with several ranks, up to `STEPS_TO_AGREE`), saves and raises
    `Interrupted`; the second stops at once.
    Lightning calls checkpoint callbacks behind all others, so what these do in a step is in the file.

    Args:
        folder: The run's folder.
        every_n_steps: Optimiser steps between two files.
    """

    def __init__(self, folder: str | Path, every_n_steps: int = 100):
        if every_n_steps < 1:
            raise UserError(f"every_n_steps is {every_n_steps}, but it must be at least 1 (callbacks.checkpoint)")
        self.path, self.every_n_steps = Path(folder) / LAST, every_n_steps
        self.saved_step: int | None = None
        self.requested = self.leaving = False
        self._seen_step = 0
        self._handlers: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Listen for signals; a resumed run has a good file already."""
        self._seen_step = trainer.global_step
        self.saved_step = trainer.global_step if self.path.is_file() else None
        if threading.current_thread() is threading.main_thread():
            self._handlers = {each: signal.signal(each, self._on_signal) for each in SIGNALS}

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any) -> None:
        """Leave between two steps, when the last one is logged."""
        if self.leaving:
            raise Interrupted(trainer.global_step, self.path)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any, **__: Any
    ) -> None:
        """Save when it is time to, or when a signal has come to any rank."""
        if trainer.global_step == self._seen_step:
            return
        self._seen_step = trainer.global_step
        leave = self.requested
        if trainer.world_size > 1:
            # Agreeing waits for the GPUs, which would then run idle at the beginning of every step.
            leave = trainer.global_step % STEPS_TO_AGREE == 0 and trainer.strategy.reduce_boolean_decision(
                self.requested, all=False
            )
        if leave or trainer.global_step % self.every_n_steps == 0:
            self._save(trainer, pl_module)
        self.leaving = leave

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save the last step."""
        self._stop_listening()
        if self.saved_step != trainer.global_step and trainer.global_step > 0:
            self._save(trainer, pl_module)

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Give the signals back."""
        self._stop_listening()

    @property
    def last_good(self) -> str:
        """Where the last good state is, in words."""
        if self.saved_step is None:
            return f"no checkpoint was written yet (one comes every {self.every_n_steps} steps)"
        return f"the last good state, after step {self.saved_step}, is in {self.path}"

    def _save(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if not all(bool(torch.isfinite(parameter).all()) for parameter in trained):
            raise UserError(
                f"the weights are no longer finite after step {trainer.global_step}; {self.last_good}. "
                f"Start again with a lower model.learning_rate"
            )
        trainer.save_checkpoint(self.path, weights_only=False)
        self.saved_step = trainer.global_step

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def _stop_listening(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}


def last_checkpoint(trainer: lightning.Trainer) -> LastCheckpoint | None:
    """The trainer's `LastCheckpoint`, if it has one."""
    return next((each for each in trainer.checkpoint_callbacks if isinstance(each, LastCheckpoint)), None)
