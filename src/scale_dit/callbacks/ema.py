"""Exponential moving average of the trained parameters alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import lightning
import torch

from scale_dit.errors import UserError


class TrainableEMA(lightning.Callback):
    """Averages the parameters that require a gradient, and leaves the average in the module when training ends.

    Lightning's own averaging copies the whole module, frozen base included; here only what is trained is kept.
    Validation runs on the average. The average is part of the checkpoint, so a resumed run continues it exactly.

    Args:
        decay: Weight of the old average a step; during the first steps `(1 + n) / (10 + n)` if that is smaller.
    """

    def __init__(self, decay: float = 0.999):
        if not 0 <= decay < 1:
            raise UserError(f"decay is {decay}; it must be at least 0 and below 1 (callbacks.ema.decay=0.99)")
        self.decay = decay
        self.updates = 0
        self.average: dict[str, torch.Tensor] = {}
        self.current: dict[str, torch.Tensor] = {}

    @staticmethod
    def _trainable(module: lightning.LightningModule) -> dict[str, torch.nn.Parameter]:
        return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start from the current weights, or go on from the checkpoint's average."""
        parameters = self._trainable(pl_module)
        if not self.average:
            self.average = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self.average = {name: self.average[name].to(parameter.device) for name, parameter in parameters.items()}

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any, **__: Any
    ) -> None:
        """Fold the new weights in, once an optimiser step."""
        if trainer.global_step == self.updates:
            return
        self.updates = trainer.global_step
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        parameters = self._trainable(pl_module)
        torch._foreach_lerp_(
            [self.average[name] for name in parameters], [p.data for p in parameters.values()], 1 - decay
        )

    @contextmanager
    def averaged(self, module: lightning.LightningModule) -> Iterator[None]:
        """Inside, the module holds the average; behind, the weights that the optimiser moves, bit for bit."""
        self._swap_in(module)
        try:
            yield
        finally:
            self._swap_out(module)

    @torch.no_grad()
    def _swap_in(self, module: lightning.LightningModule) -> None:
        parameters = self._trainable(module)
        self.current = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            parameter.copy_(self.average[name])

    @torch.no_grad()
    def _swap_out(self, module: lightning.LightningModule) -> None:
        for name, parameter in self._trainable(module).items():
            if name in self.current:
                parameter.copy_(self.current[name])
        self.current = {}

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Validate the average."""
        if self.average:
            self._swap_in(pl_module)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Back to the weights that the optimiser moves."""
        self._swap_out(pl_module)

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Leave the average in the module, after the last checkpoint and before the module exports itself."""
        if self.average:
            self._swap_in(pl_module)
            self.current = {}

    def state_dict(self) -> dict[str, Any]:
        """The average and the count of updates."""
        return {"average": self.average, "updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.average, self.updates = state_dict["average"], state_dict["updates"]


def averaged_weights(trainer: lightning.Trainer) -> Any:
    """A context in which the trainer's module holds averaged weights, if they are averaged."""
    average = next((each for each in trainer.callbacks if isinstance(each, TrainableEMA)), None)
    return average.averaged(trainer.lightning_module) if average is not None and average.average else nullcontext()
