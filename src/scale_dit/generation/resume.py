"""Going on in the folder of an earlier command."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from scale_dit.run_folder import arguments_of_run, read_record, resume_folder

ONE_TIME = ("stage", "pick", "shard", "overwrite")
"""Options that say what one command does of a run, and nothing about the run."""


def resume_arguments(arguments: Sequence[str]) -> list[str]:
    """A command line with `resume=<folder>` becomes the one that made the folder, changed by what is given now.

    Args:
        arguments: Quoted for Hydra.

    Raises:
        UserError: No run made the folder.
    """
    folder = resume_folder(arguments)
    if folder is None:
        return list(arguments)
    started_with = read_record(folder)["overrides"]
    own_output = any(override.startswith("output=") for override in started_with)
    places = {"output": folder} if own_output else {"output": folder, "hydra.run.dir": folder}
    return arguments_of_run(folder, arguments, places, ONE_TIME)


def resume_command(folder: Path, *options: str) -> str:
    """The command that goes on in a folder, with options."""
    return shlex.join(["python", "src/generate.py", *options, f"resume={folder}"])
