"""Command lines that go on in the folder of an earlier command: `resume=<folder>`, `remake=<picture>`."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from scale_dit.errors import UserError
from scale_dit.overrides import is_override, key_of, path_argument, quote, seen_from
from scale_dit.provenance import path_of_project
from scale_dit.run_folder import RECORD, check_resumable, read_record

GENERATE, MAKE_PAIRS = "src/generate.py", "src/make_pairs.py"
"""The programs whose folders hold pictures."""
PAIR_OPTION = "scales"
"""An option that only the second has."""

ONE_TIME = ("stage", "pick", "shard", "overwrite")
"""Options that say what one command does of a run, and nothing about the run."""

PLACES = ("resume", "output", "hydra.run.dir")
"""Options that name the folder."""

_typed: list[str] = []
"""Options of this process's command, as typed; none if it is no command of the two."""

OF_ITS_PICTURES = (
    "prompt", "prompts_file", "negative_prompt", "window_prompts", "n", "seed", "height", "width", "draft", "start",
    "quality", "remake", "boxes", "mask", "output", "hydra.run.dir",
)  # fmt: skip
"""Options that say what a run makes and where, which windows of one of its pictures made anew do not inherit."""


def resume_training(arguments: Sequence[str]) -> list[str]:
    """A command line with `resume=<run folder>` becomes that run's own, in that run's folder.

    The overrides that the run was started with come first; those given now replace them. The process goes to where the
    run was started, see `arguments_of_run`. Without `resume` nothing changes.

    Raises:
        UserError: The folder cannot be resumed.
    """
    folder = path_argument(arguments, "resume")
    if folder is None:
        return list(arguments)
    check_resumable(folder)
    return _go_on(folder, arguments, ["hydra.run.dir"])


def resume_pictures(arguments: Sequence[str], program: str = GENERATE) -> list[str]:
    """A command line with `resume=<folder>` becomes the one that made the folder, changed by what is given now.

    The process goes to where that was run.

    Args:
        arguments: Quoted for Hydra.
        program: The one that goes on, as in `resume_command`.

    Raises:
        UserError: No run made the folder, or another program's.
    """
    folder = path_argument(arguments, "resume")
    _typed[:] = filter(is_override, sys.orig_argv)
    if folder is None:
        return list(arguments)
    record = read_record(folder)
    made_by = MAKE_PAIRS if PAIR_OPTION in record.get("config", {}) else GENERATE
    if made_by != program:
        raise UserError(f"{folder} was made by another program: {resume_command(folder, program=made_by)}")
    own_output = any(override.startswith("output=") for override in record["overrides"])
    return _go_on(folder, arguments, ["output"] if own_output else ["output", "hydra.run.dir"], ONE_TIME)


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
    began = _where_it_began(picture.parent)
    kept = _first_overrides(picture.parent, (*ONE_TIME, *OF_ITS_PICTURES))
    return _joined({key: seen_from(began, override) for key, override in kept.items()}, {}, arguments)


def resume_command(folder: Path, *options: str, program: str = GENERATE) -> str:
    """The command that goes on in a folder of a program, with options; for where the process is."""
    return _command(program, *options, f"resume={folder}")


def go_on_command(folder: Path, *options: str, program: str = GENERATE) -> str:
    """The command that goes on in a folder with what this process's does; options replace its own.

    With `resume=<folder>` it repeats what the folder's record lacks. All that was typed is given again if that was
    typed without `resume` in the folder of another command, whose options would be taken over.
    """
    replaced = {"overwrite", *map(key_of, options)}
    typed = [each for each in _typed if key_of(each) not in replaced]
    places = {*PLACES}.intersection(map(key_of, typed))
    if "resume" in places:
        again = [each for each in typed if key_of(each) not in PLACES]
    elif places and not _is_begun_by_this(folder):
        return _command(program, *_flags(), *typed, *options)
    else:
        again = [each for each in typed if key_of(each) in ONE_TIME]
    return resume_command(folder, *_flags(), *again, *options, program=program)


def _flags() -> list[str]:
    """This process's arguments that are no overrides, such as `--config-dir` and its value, if a command was typed."""
    return [argument for argument in sys.argv[1:] if not is_override(argument)] if _typed else []


def _command(program: str, *options: str) -> str:
    """A command line of a program, for where the process is."""
    running = Path(sys.argv[0]).name == Path(program).name
    return shlex.join(["python", sys.argv[0] if running else str(Path(path_of_project()) / program), *options])


def _is_begun_by_this(folder: Path) -> bool:
    """Whether the run in `folder` was started with this process's command, but for the part of it that is done."""
    passed = (*ONE_TIME, *PLACES)
    given = {key_of(argument): argument for argument in sys.argv[1:] if is_override(argument)}
    own = {key: each for key, each in given.items() if key not in passed and not key.startswith("hydra.")}
    return _where_it_began(folder) == Path.cwd() and own == _first_overrides(folder, passed)


def _go_on(folder: Path, arguments: Sequence[str], places: Sequence[str], forget: Sequence[str] = ()) -> list[str]:
    """The command line that a run was started with, in which what is given now replaces what was.

    Its relative paths were typed where the run was started. They decide what the run is, so the process goes there
    instead of changing them; what is given now is made absolute before.

    Args:
        places: Options that are the folder.
        forget: Options of the first command that are not taken over.
    """
    began, here = _where_it_began(folder), Path.cwd()
    kept = _first_overrides(folder, forget)
    if began != here:
        folder = folder.absolute()
        arguments = [seen_from(here, argument) for argument in arguments]
        sys.argv[0] = os.path.abspath(sys.argv[0])
        os.chdir(began)
    return _joined(kept, {key: f"{key}={quote(str(folder))}" for key in places}, arguments)


def _where_it_began(folder: Path) -> Path:
    """The working directory of the run in `folder`; this process's, if that is not recorded or not here any more."""
    recorded = read_record(folder).get("directory")
    return Path(recorded) if recorded is not None and Path(recorded).is_dir() else Path.cwd()


def _first_overrides(folder: Path, forget: Sequence[str]) -> dict[str, str]:
    """The overrides that the run in `folder` was started with, by option, without some options."""
    first = {key_of(override): override for override in read_record(folder)["overrides"]}
    return {key: override for key, override in first.items() if key not in forget}


def _joined(kept: Mapping[str, str], places: Mapping[str, str], arguments: Sequence[str]) -> list[str]:
    """Flags, then overrides; where an option is there twice, what is given now counts."""
    given = {key_of(argument): argument for argument in arguments if is_override(argument)}
    flags = [argument for argument in arguments if not is_override(argument)]
    return [*flags, *{**kept, **places, **given}.values()]
