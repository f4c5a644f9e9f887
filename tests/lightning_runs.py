"""Training on a few batches with a real trainer."""

from __future__ import annotations

from pathlib import Path

import lightning
import torch
from torch import Tensor

from scale_dit.lightning import ScaleDiTModule


class Batches:
    """The batches in order, epoch after epoch; resumes in the middle of one, as the project's own loaders do."""

    def __init__(self, batches: list[dict]):
        self.batches, self.first = batches, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        while self.first < len(self.batches):
            self.first += 1
            yield self.batches[self.first - 1]
        self.first = 0

    def state_dict(self) -> dict[str, int]:
        return {"first": self.first}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.first = state["first"]


def fit(module: ScaleDiTModule, batches: list[dict], steps: int, ckpt_path: Path | None = None, **options):
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, Batches(batches), ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return trainer


def loss_of(module: ScaleDiTModule, batch: dict, seed: int = 0) -> Tensor:
    """The loss outside of training, always with the same noise."""
    module.empty_text = module.base.encode_prompts([""])
    return module.loss(batch, torch.Generator().manual_seed(seed))


class Losses(lightning.Callback):
    """The loss of every step."""

    def __init__(self):
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(float(outputs["loss"]))
