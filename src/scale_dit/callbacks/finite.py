"""Stop when the loss is not a number."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from torch import Tensor

from scale_dit.callbacks.checkpoint import last_checkpoint
from scale_dit.errors import UserError


class FiniteLoss(lightning.Callback):
    """Stops every rank before a loss that is not finite reaches the weights, and names the step and the remedy.

    On a GPU the loss travels to the host while the backward pass is under way, so that the check does not let the GPU
    run idle.
    """

    def __init__(self) -> None:
        self._losses: list[tuple[Tensor, torch.cuda.Event | None]] = []

    def on_before_backward(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, loss: Tensor
    ) -> None:
        """Send the loss to the host."""
        event = None
        value = loss.detach().mean()
        if trainer.world_size > 1:
            # The gradients are summed over all ranks, so a loss that is not finite on one concerns them all.
            torch.distributed.all_reduce(value)
        value = value.to("cpu", non_blocking=loss.is_cuda)
        if loss.is_cuda:
            event = torch.cuda.Event()
            event.record()
        self._losses.append((value, event))

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, optimizer: Any
    ) -> None:
        """Check the losses of every batch that this step learns from."""
        losses, self._losses = self._losses, []
        for value, event in losses:
            if event is not None:
                event.synchronize()
            if not bool(torch.isfinite(value)):
                raise UserError(_message(trainer, pl_module, float(value)))


def _message(trainer: lightning.Trainer, module: lightning.LightningModule, loss: float) -> str:
    checkpoint = last_checkpoint(trainer)
    kept = f" {checkpoint.last_good.capitalize()}." if checkpoint else ""
    rate = getattr(module.hparams, "learning_rate", None)
    return (
        f"the loss is {loss} in step {trainer.global_step + 1}; training stopped before it reached the weights.{kept} "
        f"Start again with a lower model.learning_rate (now {rate}), a smaller trainer.gradient_clip_val (now "
        f"{trainer.gradient_clip_val}) or trainer.precision=32-true (now {trainer.precision})"
    )
