"""Speed, memory, learning rate and gradient norm in the log."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

GIB = 2**30


class TrainingStatistics(lightning.Callback):
    """Logs, whenever the trainer logs, beside the loss and at the same step:

    `train/gradient_norm` (2-norm over all trained parameters, before clipping), `train/learning_rate`,
    `speed/steps_per_second` and `speed/pictures_per_second` (wall clock since the last entry, over all devices, without
    validation and sample pictures), `memory/peak_gib` (of the GPU since the second step, or of the process on a CPU).
    """

    def __init__(self) -> None:
        self._begin: float | None = None
        self._steps = self._pictures = 0

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """The gradient's norm, and the rate of the step to come; clipping and the scheduler come after this hook."""
        if self._is_due(trainer, ahead=1):
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            pl_module.log("train/gradient_norm", torch.nn.utils.get_total_norm(gradients))
            pl_module.log("train/learning_rate", optimizer.param_groups[0]["lr"])

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Start the clock."""
        if self._begin is None:
            self._begin = time.perf_counter()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """Count, and log when it is time to."""
        self._steps += (index + 1) % trainer.accumulate_grad_batches == 0
        self._pictures += batch_size(batch) * trainer.world_size
        if not self._is_due(trainer) or self._begin is None:
            return
        seconds = time.perf_counter() - self._begin
        pl_module.log_dict(
            {
                "speed/steps_per_second": self._steps / seconds,
                "speed/pictures_per_second": self._pictures / seconds,
                "memory/peak_gib": peak_memory(pl_module.device) / GIB,
            }
        )
        self._begin, self._steps, self._pictures = None, 0, 0

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """What validation takes is not training's speed: forget the entry that it would fall into."""
        self._begin, self._steps, self._pictures = None, 0, 0

    @staticmethod
    def _is_due(trainer: lightning.Trainer, ahead: int = 0) -> bool:
        return (trainer.global_step + ahead) % trainer.log_every_n_steps == 0


def batch_size(batch: Any) -> int:
    """Length of the first axis of the first tensor with axes in a nested batch."""
    return next(len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that was allocated on a GPU, or the process's largest resident size on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB
