"""What the entry points share: their start, and errors a person can read."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from omegaconf import DictConfig

from scale_dit.errors import Interrupted, UserError
from scale_dit.messages import print_error, print_note
from scale_dit.quiet import quiet_libraries
from scale_dit.run_folder import FAILED, LAST, resume_command
from scale_dit.starting import INTERRUPTED_STATUS, interruptible, is_first_process
from scale_dit.sweeps import is_sweep

Result = TypeVar("Result")


def start(main: Callable[[], None], *rewrites: Callable[[list[str]], list[str]]) -> None:
    """Run a Hydra program on its command line, as `rewrites`, one after the other, make it."""
    try:
        with interruptible():
            for rewrite in rewrites:
                sys.argv[1:] = rewrite(sys.argv[1:])
        main()
    except UserError as error:
        print_error(error)
        sys.exit(2)
    except KeyboardInterrupt:
        _say_stopped_at_once(None)
        sys.exit(INTERRUPTED_STATUS)


def entry_point(function: Callable[[DictConfig], Result]) -> Callable[[DictConfig], Result | None]:
    """Errors that are the user's to mend become one message; anything else keeps its traceback.

    Exit status: 2 for a `UserError`, 130 for an interrupted run. In a sweep a failed job leaves its reason in its
    folder and the next one starts; the sweep's table shows it.
    """

    @functools.wraps(function)
    def wrapped(cfg: DictConfig) -> Result | None:
        try:
            with interruptible():
                quiet_libraries()
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


def _say_stopped_at_once(output: Path | None) -> None:
    if not is_first_process():
        return
    if output is not None and (output / LAST).is_file():
        print_note(
            f"\nInterrupted; what came behind the last checkpoint is lost. Go on with:\n  {resume_command(output)}"
        )
    else:
        print_note("\nInterrupted. Start again with the same command.")
