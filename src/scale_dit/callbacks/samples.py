"""Pictures of fixed prompts and seeds during training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning
import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from PIL import Image
from torch import Tensor

from scale_dit.callbacks.ema import averaged_weights
from scale_dit.errors import UserError
from scale_dit.evaluation.picture_grid import write_picture_grid
from scale_dit.pipeline import ScaleDiTPipeline


class SamplePictures(lightning.Callback):
    """Draws the same prompts with the same seeds every so many steps, with the averaged weights.

    A sheet of drafts and pictures goes to `folder/step_<n>.png`, and as a preview to W&B and TensorBoard where these
    are loggers. The training itself does not notice: weights, modes and random states are put back.

    Args:
        folder: Where the sheets go.
        prompts: One picture each.
        seeds: One a prompt; by default 0, 1, 2, ...
        every_n_steps: Optimiser steps between two sheets.
        height, width: In px; by default the method's scale times the base's native side.
        steps: Steps of draft and refinement; by default the base's.
        start: Noise level at which refinement starts.
        side: Longer side in px of a picture on the sheet.
    """

    def __init__(
        self,
        folder: str | Path,
        prompts: Sequence[str],
        seeds: Sequence[int] | None = None,
        every_n_steps: int = 500,
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        start: float = 1.0,
        side: int = 512,
    ):
        if not prompts:
            raise UserError(
                "the list of sample prompts is empty: give some (callbacks.samples.prompts), or switch sample pictures "
                "off (callbacks.samples=null)"
            )
        if seeds is not None and len(seeds) != len(prompts):
            raise UserError(f"{len(seeds)} seeds were given for {len(prompts)} sample prompts: give one a prompt")
        if every_n_steps < 1:
            raise UserError(f"every_n_steps is {every_n_steps}, but it must be at least 1 (callbacks.samples)")
        self.folder, self.prompts = Path(folder), list(prompts)
        self.seeds = list(seeds) if seeds is not None else list(range(len(self.prompts)))
        self.every_n_steps, self.height, self.width = every_n_steps, height, width
        self.steps, self.start, self.side = steps, start, side
        self._drawn_step = 0
        self._drafts: list[Tensor] | None = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Say before the first step that a size cannot be."""
        self._drawn_step = trainer.global_step
        side = round(pl_module.base_settings.native * pl_module.method.scale)
        pl_module.plan_for(self.height or side, self.width or side)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any, **__: Any
    ) -> None:
        """Draw when it is time to."""
        step = trainer.global_step
        if step % self.every_n_steps or step == self._drawn_step:
            return
        self._drawn_step = step
        if trainer.is_global_zero:
            with undisturbed(pl_module), averaged_weights(trainer), trainer.precision_plugin.forward_context():
                sheet = self._write_sheet(pl_module, step)
            for logger in trainer.loggers:
                log_preview(logger, sheet, step)
        trainer.strategy.barrier("samples")

    @torch.no_grad()
    def _write_sheet(self, module: lightning.LightningModule, step: int) -> Path:
        pipeline = ScaleDiTPipeline.over(module.base, module.method)
        pipeline.set_progress_bar_config(disable=True)
        drafts: list[Tensor] = []
        sheet = self.folder / f"step_{step:07d}.png"
        with TemporaryDirectory() as temporary:
            rows = []
            for index, (prompt, seed) in enumerate(zip(self.prompts, self.seeds, strict=True)):
                images, draft_latents, _ = pipeline(
                    prompt,
                    self.height,
                    self.width,
                    num_inference_steps=self.steps,
                    draft_steps=self.steps,
                    start=self.start,
                    generator=torch.Generator().manual_seed(seed),
                    draft_latents=self._drafts[index] if self._drafts else None,
                    return_dict=False,
                )
                row = [Path(temporary) / f"{index}_{kind}.png" for kind in ("draft", "picture")]
                images[0].save(row[1])
                if draft_latents is None:
                    row = row[1:]
                else:
                    drafts.append(draft_latents)
                    pipeline.numpy_to_pil(_channels_last(pipeline.decode(draft_latents)))[0].save(row[0])
                rows.append(row)
            write_picture_grid(sheet, rows, ["draft", "picture"][-len(rows[0]) :], self.prompts, self.side)
        # The frozen base makes the drafts, so they stay the same, unless the LoRA acts on them too.
        self._drafts = drafts if drafts and not module.base.image_adapters else None
        return sheet


def _channels_last(pictures: Tensor) -> Any:
    return pictures.permute(0, 2, 3, 1).float().cpu().numpy()


@contextmanager
def undisturbed(module: lightning.LightningModule) -> Iterator[None]:
    """Put random states and every submodule's mode back."""
    modes = {name: each.training for name, each in module.named_modules()}
    states = _collect_rng_states()
    module.eval()
    try:
        yield
    finally:
        _set_rng_states(states)
        for name, each in module.named_modules():
            each.training = modes.get(name, each.training)


def log_preview(logger: Any, sheet: Path, step: int) -> None:
    """Show a sheet in W&B or TensorBoard; other loggers have no pictures."""
    if isinstance(logger, WandbLogger):
        logger.log_image("samples", [str(sheet)], step=step)
    elif isinstance(logger, TensorBoardLogger):
        with Image.open(sheet) as picture:
            pixels = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
            logger.experiment.add_image(
                "samples", pixels.view(picture.height, picture.width, 3), step, dataformats="HWC"
            )
