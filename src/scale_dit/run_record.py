"""What every run leaves behind: its resolved config, the commit, package versions, the machine and the seed."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from scale_dit.provenance import commit, machine, running_command, versions
from scale_dit.run_folder import RECORD, read_record, write_json


def run_record(config: dict[str, Any], seed: int) -> dict[str, Any]:
    """The record of a run that starts now."""
    return {
        "command": running_command(),
        "directory": str(Path.cwd()),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "seed": seed,
        "overrides": _overrides(),
        "config": config,
    }


def write_run_record(folder: Path, config: dict[str, Any], seed: int) -> Path:
    """Write `run.json` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RECORD, run_record(config, seed))
    return folder / RECORD


def add_resumption(folder: Path, config: dict[str, Any], seed: int, step: int) -> Path:
    """Add to `run.json` that the run went on at `step`, with the command, commit and versions of now."""
    record = read_record(folder)
    now = {key: value for key, value in run_record(config, seed).items() if key not in ("seed", "overrides")}
    record.setdefault("resumed", []).append({"step": step, **now})
    write_json(folder / RECORD, record)
    return folder / RECORD


def _overrides() -> Sequence[str]:
    """What the command line changed, as Hydra wrote it down, without `resume`."""
    if not HydraConfig.initialized():
        return []
    # Reading an item would resolve it, and `\${` in a prompt would become an interpolation.
    overrides = cast(list[str], OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False))
    return [override for override in overrides if not override.startswith("resume=")]
