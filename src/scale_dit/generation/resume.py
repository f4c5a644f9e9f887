"""Going on in the folder of an earlier command."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from scale_dit.run_folder import RECORD, arguments_of_run, path_argument, read_record

ONE_TIME = ("stage", "pick", "shard", "overwrite")
"""Options that say what one command does of a run, and nothing about the run."""

OF_ITS_PICTURES = (
    "prompt", "prompts_file", "negative_prompt", "window_prompts", "n", "seed", "height", "width", "draft", "start",
    "quality", "remake", "boxes", "mask", "output", "hydra.run.dir",
)  # fmt: skip
"""Options that say what a run makes and where, which windows of one of its pictures made anew do not inherit."""


def resume_arguments(arguments: Sequence[str]) -> list[str]:
    """A command line with `resume=<folder>` becomes the one that made the folder, changed by what is given now.

    Args:
        arguments: Quoted for Hydra.

    Raises:
        UserError: No run made the folder.
    """
    folder = path_argument(arguments, "resume")
    if folder is None:
        return list(arguments)
    started_with = read_record(folder)["overrides"]
    own_output = any(override.startswith("output=") for override in started_with)
    places = {"output": folder} if own_output else {"output": folder, "hydra.run.dir": folder}
    return arguments_of_run(folder, arguments, places, ONE_TIME)


def remake_arguments(arguments: Sequence[str]) -> list[str]:
    """A command line with `remake=<picture>` becomes that of the run which made the picture, changed by what is given.

    What the run made, and how strongly, is not taken over. A picture without a run beside it takes all options from the
    command line.

    Args:
        arguments: Quoted for Hydra.
    """
    picture = path_argument(arguments, "remake")
    if picture is None or not (picture.parent / RECORD).is_file():
        return list(arguments)
    return arguments_of_run(picture.parent, arguments, {}, (*ONE_TIME, *OF_ITS_PICTURES))


def resume_command(folder: Path, *options: str) -> str:
    """The command that goes on in a folder, with options."""
    return shlex.join(["python", "src/generate.py", *options, f"resume={folder}"])
