"""The memory plan of a training run: made before weights are loaded, and held against what a step took."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from rich.console import Console

from scale_dit.callbacks.ema import TrainableEMA
from scale_dit.callbacks.statistics import peak_memory
from scale_dit.planning.machine import free_bytes
from scale_dit.planning.run import MARGIN
from scale_dit.planning.training import TrainingPlan
from scale_dit.starting import is_first_process

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
MEASURED_STEP = 2
"""The first in which the optimiser has its states."""


class TrainingMemory(lightning.Callback):
    """Predicts the memory of a step, refuses what does not fit, and measures.

    Args:
        data: The data module; its `sizes`, if it has any, are those of its pictures.
        trainer: Says where and in which precision.
        console: Where the plan is printed.

    Attributes:
        actual: Most bytes on the GPU in the second step, or of the process on a CPU; `None` before it.
    """

    def __init__(self, data: Any, trainer: lightning.Trainer, console: Console | None = None):
        self.data, self.trainer, self.console = data, trainer, console or Console()
        self.plan: TrainingPlan | None = None
        self.limit = 0
        self.actual: int | None = None
        self._steps = 0

    def before_loading(self, module: Any) -> None:
        """Plan for a `ScaleDiTModule` whose settings are known and whose weights are not loaded.

        Raises:
            UserError: A step does not fit; or the base cannot be had.
        """
        base, device = module.base_settings, self.trainer.strategy.root_device
        base.check_weights()
        settings = module.hparams
        self.plan = TrainingPlan(
            base, module.method, module.lora_settings,
            tuple(getattr(self.data, "sizes", ((base.native, base.native),))), self.data.batch_size, device,
            settings.backend, settings.optimiser, module.base_dtype, settings.gradient_checkpointing,
            settings.training_guidance_scale, AUTOCAST.get(str(self.trainer.precision)),
            any(isinstance(callback, TrainableEMA) for callback in self.trainer.callbacks),
        )  # fmt: skip
        self.limit = int(MARGIN * free_bytes(device))
        with isolate_rng():  # a run draws the same numbers whether it is planned or not
            self.plan.check(self.limit)
        self._show(None)

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: Any, *_: Any) -> None:
        """From the measured step on, `torch.cuda.max_memory_allocated` counts anew."""
        self._steps += 1
        if self._steps == MEASURED_STEP and pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Any, *_: Any) -> None:
        """Note what the measured step took."""
        if self._steps == MEASURED_STEP:
            self.actual = peak_memory(pl_module.device)

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Print what was predicted beside what it was."""
        if self.actual is not None:
            self._show(self.actual)

    def _show(self, actual: int | None) -> None:
        if self.plan is not None and is_first_process():
            self.console.print(self.plan.table(self.limit, actual))
