"""Training: from a resolved config to running objects, and on in the folder of an interrupted run."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import hydra
import lightning
import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.syntax import Syntax

from scale_dit.checkpoint_io import read_checkpoint
from scale_dit.errors import UserError
from scale_dit.lightning import ScaleDiTModule
from scale_dit.loggers import MetricsFile, close_wandb
from scale_dit.planning.training_run import TrainingMemory
from scale_dit.run_folder import (
    FINISHED,
    LAST,
    check_new,
    check_resumable,
    check_same_run,
    resume_command,
    write_json,
)
from scale_dit.run_record import add_resumption, run_record, write_run_record
from scale_dit.starting import is_first_process
from scale_dit.sweeps import check_sweep_devices, is_sweep

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def train(cfg: DictConfig) -> tuple[dict[str, float], dict[str, Any]]:
    """Train as configured, in a new folder or going on in that of `cfg.resume`.

    Returns:
        The last logged metrics, and the objects that were built, by name.

    Raises:
        UserError: What cannot be, before weights are loaded wherever that is possible.
        Interrupted: A signal came; the state is saved.
    """
    config = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
    output = Path(cfg.paths.output_dir)
    checkpoint = starting_point(cfg, config, output)
    if cfg.get("print_config"):
        Console().print(Syntax(OmegaConf.to_yaml(cfg, resolve=True), "yaml"))
    lightning.seed_everything(cfg.seed, workers=True, verbose=False)
    torch.set_float32_matmul_precision("high")
    begin = time.monotonic()
    with disk_errors(output):
        objects = build(cfg)
        trainer, model, loggers = objects["trainer"], objects["model"], objects["loggers"]
        if is_first_process():
            record_start(output, config, cfg.seed, checkpoint if cfg.get("resume") else None, loggers)
        try:
            trainer.fit(model, datamodule=objects["data"], ckpt_path=checkpoint, weights_only=True)
        finally:
            close_wandb()
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if trainer.is_global_zero:
            seconds = round(time.monotonic() - begin, 1)
            write_json(output / FINISHED, {"steps": trainer.global_step, "seconds": seconds, "metrics": metrics})
    return metrics, {"cfg": cfg, **objects}


def build(cfg: DictConfig) -> dict[str, Any]:
    """Instantiate what training needs, what is cheap first, so that its mistakes show before weights are loaded."""
    callbacks = instantiate_all(cfg.get("callbacks"))
    loggers = instantiate_all(cfg.get("logger"))
    data = hydra.utils.instantiate(cfg.data)
    trainer = hydra.utils.instantiate(cfg.trainer, callbacks=callbacks, logger=loggers)
    model_of = hydra.utils.instantiate(cfg.model, _partial_=True)
    options: dict[str, Any] = {}
    if model_of.func is ScaleDiTModule:
        memory = TrainingMemory(data, trainer)
        trainer.callbacks.append(memory)
        options["before_loading"] = memory.before_loading
    model = model_of(**options)
    return {"model": model, "data": data, "trainer": trainer, "callbacks": callbacks, "loggers": loggers}


def starting_point(cfg: DictConfig, config: dict[str, Any], output: Path) -> Path | None:
    """The checkpoint to start from, if any.

    Raises:
        UserError: A folder that cannot be used or resumed, a checkpoint that cannot be read, or a sweep over several
            devices.
    """
    if is_sweep():
        check_sweep_devices(config["trainer"])
    checkpoint: Path | None
    if cfg.get("resume"):
        checkpoint = check_resumable(Path(cfg.resume))
        if output.resolve() != Path(cfg.resume).resolve():
            raise UserError(
                f"resume={cfg.resume} goes on in that folder, but the output folder is {output}: leave it unset"
            )
        check_same_run(output, config)
    else:
        if is_first_process():
            check_new(output)
        checkpoint = Path(cfg.ckpt_path) if cfg.get("ckpt_path") else None
    if checkpoint is not None:
        read_checkpoint(checkpoint)
    return checkpoint


def record_start(
    output: Path, config: dict[str, Any], seed: int, resumed_from: Path | None, loggers: list[Any]
) -> None:
    """Leave the run record, in the folder and in the loggers that keep one."""
    if resumed_from is None:
        write_run_record(output, config, seed)
    else:
        step = read_checkpoint(resumed_from)["global_step"]
        add_resumption(output, config, seed, step)
        for logger in loggers:
            if isinstance(logger, MetricsFile):
                logger.forget_from(step)
    for logger in loggers:
        logger.log_hyperparams(run_record(config, seed))


@contextmanager
def disk_errors(output: Path) -> Iterator[None]:
    """A full disk becomes one message that says what is still whole.

    Raises:
        UserError: No room, or not allowed to write.
    """
    try:
        yield
    except Exception as error:
        cause = find_disk_error(error)
        if cause is None:
            raise
        checkpoint = output / LAST
        if checkpoint.is_file():
            step = read_checkpoint(checkpoint)["global_step"]
            left = f"{checkpoint} (step {step}) is whole. Make room, then go on with: {resume_command(output)}"
        else:
            left = "no checkpoint was written yet. Make room, or choose another disk (paths.log_dir=<folder>)"
        raise UserError(f"cannot write into {output.resolve()}: {cause}; {left}") from error


def find_disk_error(error: BaseException | None) -> str | None:
    """What the operating system says if an error comes from a full disk; libraries hide it in their own exceptions."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            return os.strerror(error.errno)
        for number in DISK_FULL:
            if f"(os error {number})" in str(error):  # safetensors
                return os.strerror(number)
        error = error.__cause__ or error.__context__
    return None


def instantiate_all(group: DictConfig | None) -> list[Any]:
    """Instantiate every entry of a group of configs that has a `_target_`; null entries are switched off."""
    built = [hydra.utils.instantiate(entry) for entry in (group or {}).values() if entry and "_target_" in entry]
    return [each for each in built if each is not None]
