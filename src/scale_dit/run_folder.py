"""What a run's folder holds, which folders a run may use, and how an interrupted run is taken up again."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from scale_dit.errors import UserError
from scale_dit.files import write_atomically
from scale_dit.overrides import quote

RECORD = "run.json"
FINISHED = "finished.json"
FAILED = "failed.txt"
CHECKPOINTS = "checkpoints"
LAST = f"{CHECKPOINTS}/last.ckpt"

# A change of these would make another run of it; everything else (steps, loggers, callbacks, devices) may change.
FIXED = ("base", "method", "lora", "model", "data", "seed")
MAY_CHANGE = ("data.workers", "model.export")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file that is either whole or not there."""
    write_atomically(path, json.dumps(content, indent=2) + "\n")


def read_record(folder: Path) -> dict[str, Any]:
    """The run record in `folder`.

    Raises:
        UserError: There is none, or it cannot be read.
    """
    path = folder / RECORD
    if not folder.is_dir():
        raise UserError(f"there is no run folder {folder}: give the folder that the run printed (resume=<run folder>)")
    if not path.is_file():
        raise UserError(f"{folder} is no run folder: it holds no {RECORD}; give the folder that the run printed")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"the run record {path} cannot be read ({error}); start a new run") from error


def check_new(folder: Path) -> None:
    """Refuse a folder that holds a run already.

    Raises:
        UserError: The folder holds a finished run, or one that can be resumed.
    """
    if (folder / FINISHED).is_file():
        raise UserError(
            f"the output folder {folder} already holds a finished run: choose another one (hydra.run.dir=<folder>), "
            f"or delete it"
        )
    if (folder / LAST).is_file():
        raise UserError(
            f"the output folder {folder} already holds an unfinished run: go on with it ({resume_argument(folder)}), "
            f"choose another one (hydra.run.dir=<folder>), or delete it"
        )


def check_resumable(folder: Path) -> Path:
    """The checkpoint from which the run in `folder` goes on.

    Raises:
        UserError: No run, a finished run, or a run without a checkpoint.
    """
    read_record(folder)
    if (folder / FINISHED).is_file():
        raise UserError(
            f"the run in {folder} is already finished, so there is nothing to resume: start a new run, from its "
            f"LoRA if you like (model.initial_lora={folder}/lora)"
        )
    if not (folder / LAST).is_file():
        raise UserError(
            f"the run in {folder} has no checkpoint ({LAST}): it stopped before one was written; start it again"
        )
    return folder / LAST


def check_same_run(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse to resume with settings that would make it another run.

    Raises:
        UserError: What is trained or learned from differs; each key with both values.
    """
    before = dict(flatten({key: read_record(folder)["config"].get(key) for key in FIXED}))
    now = dict(flatten({key: config.get(key) for key in FIXED}))
    keys = sorted(
        key for key in before.keys() | now.keys() if key not in MAY_CHANGE and before.get(key) != now.get(key)
    )
    if keys:
        changes = "; ".join(f"{key} was {before.get(key)!r}, now {now.get(key)!r}" for key in keys[:8])
        raise UserError(
            f"the run in {folder} was started with other settings: {changes}. Leave these as they were, or "
            f"start a new run"
        )


def flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and plain values of nested mappings."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, config


def resume_argument(folder: Path) -> str:
    """`resume=<folder>`, quoted for the shell and for Hydra where that is needed."""
    value = str(folder)
    if not re.fullmatch(r"[\w/.:+-]+", value):
        value = quote(value)
    return shlex.quote(f"resume={value}")


def resume_command(folder: Path) -> str:
    """The command that goes on with the run in `folder`."""
    return f"python {shlex.quote(sys.argv[0])} {resume_argument(folder)}"
