"""Going on in the folder of an earlier command."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from scale_dit.errors import UserError
from scale_dit.run_folder import RECORD, arguments_of_run, path_argument, read_record

GENERATE, MAKE_PAIRS = "src/generate.py", "src/make_pairs.py"
"""The programs whose folders these are."""
PAIR_OPTION = "scales"
"""An option that only the second has."""

ONE_TIME = ("stage", "pick", "shard", "overwrite")
"""Options that say what one command does of a run, and nothing about the run."""

OF_ITS_PICTURES = (
    "prompt", "prompts_file", "negative_prompt", "window_prompts", "n", "seed", "height", "width", "draft", "start",
    "quality", "remake", "boxes", "mask", "output", "hydra.run.dir",
)  # fmt: skip
"""Options that say what a run makes and where, which windows of one of its pictures made anew do not inherit."""


def resume_arguments(arguments: Sequence[str], program: str = GENERATE) -> list[str]:
    """A command line with `resume=<folder>` becomes the one that made the folder, changed by what is given now.

    Args:
        arguments: Quoted for Hydra.
        program: The one that goes on, as in `resume_command`.

    Raises:
        UserError: No run made the folder, or another program's.
    """
    folder = path_argument(arguments, "resume")
    if folder is None:
        return list(arguments)
    record = read_record(folder)
    made_by = MAKE_PAIRS if PAIR_OPTION in record.get("config", {}) else GENERATE
    if made_by != program:
        raise UserError(f"{folder} was made by another program: {resume_command(folder, program=made_by)}")
    started_with = record["overrides"]
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


def resume_command(folder: Path, *options: str, program: str = GENERATE) -> str:
    """The command that goes on in a folder of a program, with options."""
    return shlex.join(["python", program, *options, f"resume={folder}"])
