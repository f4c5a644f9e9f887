"""What Hydra calls around runs and sweeps: folders are checked before they are touched, sweeps end with a table."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from scale_dit.errors import UserError
from scale_dit.messages import print_error
from scale_dit.run_folder import FAILED, FINISHED, RECORD, check_new, check_resumable, read_record
from scale_dit.starting import is_first_process


class RunFolders(Callback):
    """Refuses a folder that holds a run before Hydra writes into it, and several devices in a sweep.

    Hydra turns exceptions of its callbacks into warnings, so the refusal exits.
    """

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Check the output folder of a single run."""
        folder = Path(config.hydra.run.dir)
        try:
            if OmegaConf.select(config, "resume"):
                trains = OmegaConf.select(config, "trainer") is not None
                (check_resumable if trains else read_record)(Path(config.resume))
            elif is_first_process():
                check_new(folder)
        except UserError as error:
            print_error(error)
            sys.exit(2)

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Check what all jobs of a sweep share."""
        try:
            # Other keys of the trainer name the output folder, which is known in a job only.
            keys = ("devices", "accelerator", "strategy", "num_nodes")
            check_sweep_devices({key: OmegaConf.select(config, f"trainer.{key}") for key in keys})
            if OmegaConf.select(config, "resume"):
                raise UserError(
                    "resume= goes on with one run, not with a sweep: resume each unfinished job by its folder"
                )
        except UserError as error:
            print_error(error)
            sys.exit(2)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Write and print the table; exit with status 1 if a job failed."""
        rows = sweep_results(Path(config.hydra.sweep.dir))
        if rows:
            write_summary(rows, Path(config.hydra.sweep.dir) / "summary.csv")
        if any(row["status"] == "failed" for row in rows):
            sys.exit(1)


def is_sweep() -> bool:
    """Whether this is a job of a sweep (`--multirun`)."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def check_sweep_devices(trainer: dict[str, Any]) -> None:
    """Refuse a sweep over runs with several processes each.

    The further ranks are started with the sweep's own command line, so each would run the whole sweep again.

    Raises:
        UserError: More than one device or node.
    """
    devices, nodes = trainer.get("devices") or 1, trainer.get("num_nodes") or 1
    if device_count(devices, trainer.get("accelerator") or "auto") > 1 or nodes > 1:
        raise UserError(
            f"a sweep (--multirun) runs each job on one device, but trainer.devices is {devices!r} on {nodes} node(s) "
            f"(trainer.strategy={trainer.get('strategy') or 'auto'}): use trainer.devices=1, or start jobs one by one"
        )


def device_count(devices: Any, accelerator: str) -> int:
    """How many devices Lightning would take."""
    if isinstance(devices, Sequence) and not isinstance(devices, str):
        return len(devices)
    if str(devices) not in ("auto", "-1"):
        text = str(devices)
        return len(text.split(",")) if "," in text else int(text)
    import torch

    return torch.cuda.device_count() if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available() else 1


def sweep_results(folder: Path) -> list[dict[str, Any]]:
    """A row for each job of a sweep: number, the overrides that differ between jobs, status, loss, seconds, reason."""
    jobs = [
        each for each in folder.iterdir() if each.is_dir() and ((each / RECORD).is_file() or (each / FAILED).is_file())
    ]
    jobs.sort(key=lambda each: (not each.name.isdigit(), int(each.name) if each.name.isdigit() else 0, each.name))
    overrides = [_overrides(job) for job in jobs]
    names = list(dict.fromkeys(name for job in overrides for name in job))
    differing = [name for name in names if len({job.get(name) for job in overrides}) > 1]
    rows = []
    for job, values in zip(jobs, overrides, strict=True):
        finished = json.loads((job / FINISHED).read_text()) if (job / FINISHED).is_file() else {}
        reason = (job / FAILED).read_text().strip() if (job / FAILED).is_file() else ""
        status = "finished" if finished else "failed" if reason else "unfinished"
        loss = finished.get("metrics", {}).get("train/loss", "")
        outcome = {"status": status, "loss": loss, "seconds": finished.get("seconds", ""), "reason": reason}
        rows.append({"job": job.name} | {name: values.get(name, "") for name in differing} | outcome)
    return rows


def _overrides(job: Path) -> dict[str, str]:
    path = job / ".hydra" / "overrides.yaml"
    if not path.is_file():
        return {}
    overrides = [str(override).lstrip("+~").partition("=") for override in OmegaConf.load(path)]
    return {name: value for name, _, value in overrides}


def write_summary(rows: list[dict[str, Any]], path: Path) -> None:
    """Write the rows as CSV and print them as a table, the lowest loss first."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    columns = [name for name in rows[0] if name != "reason" or any(row["reason"] for row in rows)]
    table = Table(*columns)
    for row in sorted(rows, key=lambda row: (row["loss"] == "", row["loss"])):
        table.add_row(*(f"{row[name]:.4g}" if isinstance(row[name], float) else str(row[name]) for name in columns))
    # Without a terminal a table would be squeezed into 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    # A path that is broken over two lines cannot be copied.
    console.print(f"summary: {path}", soft_wrap=True, highlight=False)
