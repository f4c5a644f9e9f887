"""From the config of `src/eval.py` to a finished report."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import hydra
import torch
from lightning.pytorch.loggers import Logger, WandbLogger
from omegaconf import DictConfig, OmegaConf

from scale_dit.data.captions import caption
from scale_dit.data.scene_batches import held_out_scenes
from scale_dit.data.scenes import render
from scale_dit.errors import UserError
from scale_dit.evaluation.baselines import Setting, choose_arms, default_lora
from scale_dit.evaluation.report import Results
from scale_dit.evaluation.runner import evaluate
from scale_dit.generation.loras import Loras
from scale_dit.loggers import close_wandb
from scale_dit.pipeline import ScaleDiTPipeline
from scale_dit.run_record import write_run_record
from scale_dit.sampling import check_sampling


def evaluate_config(cfg: DictConfig) -> Results:
    """Evaluate the arms that `cfg` names on held-out scenes.

    Raises:
        UserError: Anything that cannot be, before weights are loaded.
    """
    if cfg.n < 1:
        raise UserError(f"n is {cfg.n}, but at least one prompt is needed: set n=8")
    base, method = hydra.utils.instantiate(cfg.base), hydra.utils.instantiate(cfg.method)
    side = round(base.native * method.scale)
    height, width = cfg.height or side, cfg.width or side
    method.plan(base, height, width)
    check_sampling(base, cfg.start, cfg.steps, cfg.draft_steps, cfg.guidance_scale, cfg.draft_guidance_scale)
    lora = default_lora(cfg.lora.path)
    Loras(lora, cfg.lora.base).check(base)
    metrics = hydra.utils.instantiate(cfg.metrics, _convert_="all")
    baselines = hydra.utils.instantiate(cfg.get("baselines") or {}, _convert_="all")
    output = Path(cfg.paths.output_dir)
    write_run_record(output, plain(cfg), cfg.seed)
    device = torch.device(cfg.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    pipeline = ScaleDiTPipeline.from_pretrained(
        base.path, settings=base, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.configure(base, cfg.attention.name)
    setting = Setting(
        pipeline.to(device), method, lora, height, width, cfg.lora.base, start=cfg.start, steps=cfg.steps,
        draft_steps=cfg.draft_steps, guidance_scale=cfg.guidance_scale, draft_guidance_scale=cfg.draft_guidance_scale,
    )  # fmt: skip
    loggers = [hydra.utils.instantiate(logger) for logger in (cfg.get("logger") or {}).values()]
    arms = choose_arms(baselines, setting, list(cfg.only) if cfg.only else None)
    scenes = held_out_scenes(cfg.n, aspect=width / height)
    return evaluate(
        arms,
        [caption(scene, scene.seed) for scene in scenes],
        [cfg.seed + index for index in range(cfg.n)],
        metrics,
        output,
        scenes=scenes,
        reference=lambda records, height, width: render(
            [record.scene for record in records], height, width, device
        ).cpu(),
        baseline=cfg.compare_with if cfg.compare_with in arms else None,
        batch_size=cfg.batch_size,
        grid_rows=cfg.grid_rows,
        summary=partial(log_summary, loggers),
    )


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The resolved config as plain values."""
    values = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def log_summary(loggers: list[Logger | None], numbers: dict[str, float], grid: Path | None) -> None:
    """Put the flat numbers, and a preview of the picture grid, into the W&B run's summary, if there is one."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.summary.update(numbers)
            if grid is not None:
                logger.log_image("pictures", [str(grid)])
    close_wandb()
