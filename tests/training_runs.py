"""Short real training runs on the small random base."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

ROOT = Path(__file__).parent.parent
SMALL_BASE = ("base.name=small", "base.native=128", "base.text_length=24", "base.steps=2")
SHORT = (
    "logger=csv",
    "data.count=8",
    "data.batch_size=2",
    "callbacks.samples=null",
    "callbacks.progress=null",
    "trainer.enable_progress_bar=false",
    "trainer.accelerator=cpu",
    "trainer.log_every_n_steps=1",
)


def overrides(base: Path, *more: str) -> list[str]:
    """Command-line overrides of a short run on the base in `base`."""
    return ["experiment=scale_dit_4k", "base=tiny", f"base.path={base}", *SMALL_BASE, *SHORT, *more]


def training_config(base: Path, output: Path, *more: str) -> DictConfig:
    """The config of a short run on the base in `base`, which writes into `output`."""
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose("train", overrides=[*overrides(base, *more), f"paths.output_dir={output}"])


def command_environment() -> dict[str, str]:
    """The environment of a subprocess that runs an entry point of this checkout."""
    path = os.pathsep.join(str(ROOT / folder) for folder in ("src", "kernels", "tests"))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}


class SignalAt(lightning.Callback):
    """Sends this process a signal in the middle of a step."""

    def __init__(self, step: int, number: int = signal.SIGINT, times: int = 1):
        self.step, self.number, self.times = step, number, times

    def on_before_backward(self, trainer: lightning.Trainer, *_: Any) -> None:
        """The step that makes `global_step` equal `step` is running."""
        if trainer.global_step + 1 == self.step:
            for _ in range(self.times):
                signal.raise_signal(self.number)


class SpoilWeights(lightning.Callback):
    """Makes a weight infinite behind a step's back, as an overflow would."""

    def __init__(self, step: int, value: float = float("nan")):
        self.step, self.value = step, value

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any) -> None:
        """After `step` steps."""
        if trainer.global_step == self.step:
            weight = next(parameter for parameter in pl_module.parameters() if parameter.requires_grad)
            with torch.no_grad():
                weight.view(-1)[0] = self.value


class LimitFileSize(lightning.Callback):
    """From a step on the operating system refuses files above a size, as a full disk does."""

    def __init__(self, step: int, size: int):
        self.step, self.size = step, size

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        """`step` steps are done."""
        if trainer.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
