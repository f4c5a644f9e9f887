"""The entry points in processes of their own, forked from one that has imported what they import.

A command takes ten seconds of imports and then does a second's work. Here the imports are done once for all commands
of a session; arguments, working directory, environment, signals, output and exit status are a process's own.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import NamedTuple

from training_runs import ROOT, command_environment

CONTEXT = multiprocessing.get_context("forkserver")
IMPORTS = (
    "scale_dit.entry",
    "scale_dit.training",
    "scale_dit.generation.command",
    "scale_dit.evaluation.baselines",
    "diffusers.pipelines.flux.pipeline_flux",
    "lightning.pytorch.trainer.trainer",
)


class Answer(NamedTuple):
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


@dataclass
class Started:
    """A running command; its output lies in `folder`."""

    process: multiprocessing.context.ForkServerProcess
    folder: tempfile.TemporaryDirectory

    def poll(self) -> int | None:
        """The exit status, or None while the command runs."""
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        """To the command, as the operating system would."""
        os.kill(self.process.pid, number)

    def wait(self, seconds: float = 300) -> Answer:
        """The end of the command; it is killed and `AssertionError` raised if that takes longer."""
        self.process.join(seconds)
        running = self.process.is_alive()
        if running:
            self.process.kill()
            self.process.join()
        with self.folder:
            answer = Answer(self.process.exitcode, *((Path(self.folder.name) / each).read_text() for each in "12"))
        assert not running, f"still running after {seconds} s: {answer}"
        return answer


def start(script: str, *arguments: str, cwd: Path = ROOT) -> Started:
    """Start `python src/<script> <arguments>` in a folder."""
    folder = tempfile.TemporaryDirectory()
    process = context().Process(target=_run, args=(script, arguments, cwd, command_environment(), folder.name))
    process.start()
    return Started(process, folder)


def run(script: str, *arguments: str, cwd: Path = ROOT) -> Answer:
    """Run `python src/<script> <arguments>` in a folder to its end."""
    return start(script, *arguments, cwd=cwd).wait()


def context() -> multiprocessing.context.ForkServerContext:
    """What starts processes that have the imports; the first call makes them, in the environment of a command."""
    CONTEXT.set_forkserver_preload(list(IMPORTS))
    with contextlib.ExitStack() as stack:
        before = dict(os.environ)
        stack.callback(lambda: (os.environ.clear(), os.environ.update(before)))
        os.environ.update(command_environment())
        forkserver.ensure_running()
    return CONTEXT


def _run(script: str, arguments: tuple[str, ...], cwd: Path, environment: dict[str, str], output: str) -> None:
    """What `python src/<script> <arguments>` does after Python's own start."""
    for number in (1, 2):
        os.dup2(os.open(f"{output}/{number}", os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    program = f"src/{script}" if cwd == ROOT else str(ROOT / "src" / script)
    sys.path.insert(0, str(ROOT / "src"))
    sys.argv = [program, *arguments]
    sys.orig_argv = [sys.executable, *sys.argv]
    # Where the tests run in a shell's background, Ctrl-C is ignored, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    runpy.run_path(program, run_name="__main__")
