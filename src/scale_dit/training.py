"""What the entry points share: from a resolved config to running objects, and errors a person can read."""

from __future__ import annotations

import errno
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import hydra
import lightning
import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.syntax import Syntax

from scale_dit.callbacks.checkpoint import Interrupted
from scale_dit.checkpoint_io import read_checkpoint
from scale_dit.errors import UserError
from scale_dit.lightning import ScaleDiTModule
from scale_dit.loggers import MetricsFile, close_wandb
from scale_dit.messages import print_error, print_note
from scale_dit.planning.training_run import TrainingMemory
from scale_dit.quiet import quiet_libraries
from scale_dit.run_folder import (
    FAILED,
    FINISHED,
    LAST,
    check_new,
    check_resumable,
    check_same_run,
    resume_arguments,
    resume_command,
    write_json,
)
from scale_dit.run_record import add_resumption, run_record, write_run_record
from scale_dit.sweeps import check_sweep_devices, is_first_process, is_sweep

Result = TypeVar("Result")

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
INTERRUPTED_STATUS = 130


def entry_point(function: Callable[[DictConfig], Result]) -> Callable[[DictConfig], Result | None]:
    """Errors that are the user's to mend become one message; anything else keeps its traceback.

    Exit status: 2 for a `UserError`, 130 for an interrupted run. In a sweep a failed job leaves its reason in its
    folder and the next one starts; the sweep's table shows it.
    """

    @functools.wraps(function)
    def wrapped(cfg: DictConfig) -> Result | None:
        quiet_libraries()
        try:
            return function(cfg)
        except Interrupted as stop:
            if is_first_process():
                print_note(
                    f"\nInterrupted after step {stop.step}; the state is saved. Go on with:\n"
                    f"  {resume_command(stop.checkpoint.parent.parent)}"
                )
            sys.exit(INTERRUPTED_STATUS)
        except (Exception, SystemExit, KeyboardInterrupt) as raised:
            if _was_interrupted(raised):
                if is_first_process():
                    _say_stopped_at_once(Path(cfg.paths.output_dir))
                sys.exit(INTERRUPTED_STATUS)
            error = find_user_error(raised)
            if error is None:
                raise
            print_error(error)
            if not is_sweep():
                sys.exit(2)
            (Path(cfg.paths.output_dir) / FAILED).write_text(f"{error}\n")
            return None

    return wrapped


def resumable(main: Callable[[], None]) -> Callable[[], None]:
    """Let `resume=<run folder>` alone stand for the command line and the folder of that run."""

    @functools.wraps(main)
    def wrapped() -> None:
        try:
            sys.argv[1:] = resume_arguments(sys.argv[1:])
        except UserError as error:
            print_error(error)
            sys.exit(2)
        main()

    return wrapped


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


def find_user_error(error: BaseException | None) -> UserError | None:
    """The `UserError` behind an exception: Hydra and Lightning wrap what is raised inside them."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__
    return error


def _was_interrupted(error: BaseException) -> bool:
    """A Ctrl-C that was not left to the end of the step; Lightning turns it into an exit."""
    return isinstance(error, KeyboardInterrupt) or (
        isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt)
    )


def _say_stopped_at_once(output: Path) -> None:
    if (output / LAST).is_file():
        print_note(
            f"\nInterrupted; what came behind the last checkpoint is lost. Go on with:\n  {resume_command(output)}"
        )
    else:
        print_note("\nInterrupted. Start again with the same command.")


def instantiate_all(group: DictConfig | None) -> list[Any]:
    """Instantiate every entry of a group of configs that has a `_target_`; null entries are switched off."""
    built = [hydra.utils.instantiate(entry) for entry in (group or {}).values() if entry and "_target_" in entry]
    return [each for each in built if each is not None]
