"""Stop when the loss is not a number."""

from __future__ import annotations

import lightning
import torch
from torch import Tensor

from scale_dit.callbacks.checkpoint import last_checkpoint
from scale_dit.errors import UserError


class FiniteLoss(lightning.Callback):
    """Stops before a loss that is not finite reaches the weights, and names the step and the remedy."""

    def on_before_backward(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, loss: Tensor
    ) -> None:
        """Check the loss of every step."""
        if bool(torch.isfinite(loss.detach()).all()):
            return
        checkpoint = last_checkpoint(trainer)
        kept = f" {checkpoint.last_good.capitalize()}." if checkpoint else ""
        rate = getattr(pl_module.hparams, "learning_rate", None)
        raise UserError(
            f"the loss is {float(loss.detach().mean())} in step {trainer.global_step + 1}; training stopped before it "
            f"reached the weights.{kept} Start again with a lower model.learning_rate (now {rate}), a smaller "
            f"trainer.gradient_clip_val (now {trainer.gradient_clip_val}) or trainer.precision=32-true (now "
            f"{trainer.precision})"
        )
