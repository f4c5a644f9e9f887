"""What every run leaves behind: its resolved config, the commit, package versions, the machine and the seed."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig

from scale_dit.run_folder import RECORD, read_record, write_json

PACKAGES = ("torch", "diffusers", "transformers", "peft", "lightning", "hydra-core", "numpy", "triton")


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that decide the numbers."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def git_commit() -> str:
    """Short hash of the checked-out commit, with `-dirty` where tracked files differ; `unknown` outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        answer = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("SCALE_DIT_COMMIT", "unknown")
    return answer.stdout.strip()


def machine_name() -> str:
    """The accelerator's name, or the processor's with its number of cores."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()}x {torch.cuda.get_device_name()}"
    return f"CPU {platform.machine()}, {os.cpu_count()} cores"


def run_record(config: dict[str, Any], seed: int) -> dict[str, Any]:
    """The record of a run that starts now."""
    return {
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "machine": machine_name(),
        "versions": package_versions(),
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
    return [override for override in HydraConfig.get().overrides.task if not override.startswith("resume=")]
