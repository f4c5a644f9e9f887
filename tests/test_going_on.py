"""The command that is printed goes on with what the interrupted one did."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest

from scale_dit import resuming
from scale_dit.overrides import quote_text_options
from scale_dit.resuming import go_on_command, resume_pictures
from scale_dit.run_folder import RECORD

OWN = ["base=tiny", "prompt=a, b", "output=there", "format=webp", "quality=80"]


@pytest.fixture
def printed(tmp_path, monkeypatch):
    """What a command, as it is typed, prints to go on in a folder that a command with `OWN` began."""
    folder = tmp_path / "there"
    folder.mkdir()
    record = {"overrides": quote_text_options(OWN), "directory": str(tmp_path), "config": {}}
    (folder / RECORD).write_text(json.dumps(record))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(resuming, "_typed", [])

    def run(typed: list[str], *options: str) -> list[str]:
        monkeypatch.setattr(sys, "orig_argv", ["python", "src/generate.py", *typed])
        monkeypatch.setattr(sys, "argv", ["src/generate.py", *resume_pictures(quote_text_options(typed))])
        python, program, *arguments = shlex.split(go_on_command(Path("there"), *options))
        assert (python, program) == ("python", "src/generate.py")
        return arguments

    return run


@pytest.mark.parametrize(
    ("typed", "again"),
    [
        ([*OWN, "stage=draft", "overwrite=true"], ["stage=draft"]),
        ([*OWN, "shard=1/2", "hydra.run.dir=x"], ["shard=1/2"]),
        (["resume=there"], []),
        (["resume=there", "stage=refine", "pick=[1]", "steps=200"], ["stage=refine", "pick=[1]", "steps=200"]),
        (["prompt=it's, new", "resume=there", "hydra.run.dir=x"], ["prompt=it's, new"]),
        (["prompt=one", "prompt=two", "resume=there"], ["prompt=one", "prompt=two"]),
    ],
)
def test_the_part_of_the_run_and_changed_options_are_given_again(typed, again, printed):
    assert printed(typed) == [*again, "resume=there"], "as it was typed, not as Hydra is given it"


@pytest.mark.parametrize("typed", [["stage=decode", *OWN[:-1]], ["stage=decode", *OWN, "memory.decode=host"]])
def test_options_of_another_command_in_the_folder_are_not_taken_over(typed, printed):
    """A quality that was not given now came from the folder's first command, and what was given now was lost."""
    assert printed([*typed, "overwrite=true"]) == typed


def test_flags_are_given_again(printed):
    """A base in a config folder of the user's own is found only with it."""
    flags = ["--config-dir", "/configs"]
    assert printed([*flags, "resume=there", "stage=decode"]) == [*flags, "stage=decode", "resume=there"]
    assert printed([*flags, "stage=decode", *OWN, "steps=9"]) == [*flags, "stage=decode", *OWN, "steps=9"]


def test_the_same_options_elsewhere_are_another_command(printed, tmp_path, monkeypatch):
    """Their relative paths are others."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "there").symlink_to(tmp_path / "there")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert printed(OWN) == OWN


def test_options_of_the_remedy_replace_typed_ones(printed):
    typed = ["resume=there", "stage=refine", "format=png16"]
    assert printed(typed, "stage=decode", "memory.decode=tiled") == [
        "format=png16", "stage=decode", "memory.decode=tiled", "resume=there",
    ]  # fmt: skip


def test_from_python_the_folder_says_it_all(tmp_path, monkeypatch):
    monkeypatch.setattr(resuming, "_typed", [])
    assert go_on_command(tmp_path, "memory=least").endswith(f"src/generate.py memory=least resume={tmp_path}")
