"""What the entry points share: from a resolved config to running objects, and errors a person can read."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import hydra
import lightning
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from scale_dit.errors import UserError
from scale_dit.run_record import write_run_record

Result = TypeVar("Result")


def entry_point(function: Callable[[DictConfig], Result]) -> Callable[[DictConfig], Result]:
    """Print a `UserError` as one message and exit with status 2; anything else keeps its traceback.

    In a sweep the error is raised instead, so that the sweep reports the job.
    """

    @functools.wraps(function)
    def wrapped(cfg: DictConfig) -> Result:
        try:
            return function(cfg)
        except (UserError, InstantiationException) as raised:
            error = raised if isinstance(raised, UserError) else raised.__cause__
            if not isinstance(error, UserError):
                raise
            if HydraConfig.get().mode.name == "MULTIRUN":
                raise error from None
            Console(stderr=True).print(f"[bold red]error:[/] {error}", highlight=False, markup=True, soft_wrap=True)
            sys.exit(2)

    return wrapped


def train(cfg: DictConfig) -> tuple[dict[str, float], dict[str, Any]]:
    """Train as configured.

    Returns:
        The last logged metrics, and the objects that were built, by name.
    """
    lightning.seed_everything(cfg.seed, workers=True)
    torch.set_float32_matmul_precision("high")
    output = Path(cfg.paths.output_dir)
    write_run_record(output, OmegaConf.to_container(cfg, resolve=True), cfg.seed)
    callbacks = instantiate_all(cfg.get("callbacks"))
    loggers = instantiate_all(cfg.get("logger"))
    model = hydra.utils.instantiate(cfg.model)
    data = hydra.utils.instantiate(cfg.data)
    trainer = hydra.utils.instantiate(cfg.trainer, callbacks=callbacks, logger=loggers)
    trainer.fit(model, datamodule=data, ckpt_path=cfg.get("ckpt_path"))
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return metrics, {"cfg": cfg, "model": model, "data": data, "trainer": trainer, "callbacks": callbacks}


def instantiate_all(group: DictConfig | None) -> list[Any]:
    """Instantiate every entry of a group of configs that has a `_target_`; null entries are switched off."""
    return [hydra.utils.instantiate(entry) for entry in (group or {}).values() if entry and "_target_" in entry]
