"""Where a number or a picture comes from: command, machine, package versions, commit."""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "diffusers", "transformers", "peft", "lightning", "torchmetrics", "triton")


def project_root() -> Path:
    """The project's checkout: above this file, else above the working directory, which also stands for none."""
    for start in (Path(__file__).resolve().parent, Path.cwd().resolve()):
        for folder in (start, *start.parents):
            if (folder / "pyproject.toml").is_file() and (folder / "src" / "scale_dit").is_dir():
                return folder
    return Path.cwd()


def path_of_project() -> str:
    """`project_root` as a path to write down: `.` where one stands in it, else absolute."""
    root = project_root()
    return "." if root == Path.cwd().resolve() else str(root)


def running_command() -> str:
    """The command line that is running, as it was typed, but for the project's folder."""
    program, *arguments = sys.argv
    # The process's own arguments: entry points rewrite `sys.argv`, to quote prompts or to resume, perhaps elsewhere.
    typed = [index for index, argument in enumerate(sys.orig_argv) if Path(argument).name == Path(program).name]
    if typed:
        arguments = sys.orig_argv[typed[0] + 1 :]
    module = getattr(sys.modules.get("__main__"), "__spec__", None)
    if module is not None and module.name:
        return shlex.join(["python", "-m", module.name.removesuffix(".__main__"), *arguments])
    with contextlib.suppress(ValueError):
        program = str(Path(program).resolve().relative_to(project_root()))
    return shlex.join(["python", program, *arguments])


def machine() -> str:
    """GPU model and number if there is one, else processor and usable cores."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{_processor()}, {cores} cores"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide numbers."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def versions_line() -> str:
    """`versions` as one line: `python 3.11.7; torch 2.14.1; ...`."""
    return "; ".join(f"{package} {number}" for package, number in versions().items())


def commit() -> str:
    """Short hash of the checked-out commit.

    Outside a git checkout it is the variable SCALE_DIT_COMMIT, which whoever copied the tree may set, or empty.
    """
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=project_root(), capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("SCALE_DIT_COMMIT", "")
    return answer.stdout.strip()


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
