"""The command that is printed goes on with what the interrupted one did."""

from __future__ import annotations

import json
import sys

import pytest

from scale_dit.overrides import quote_text_options
from scale_dit.resuming import resume_pictures, typed_again
from scale_dit.run_folder import RECORD


@pytest.mark.parametrize(
    ("typed", "again"),
    [
        (["base=tiny", "prompt=a, b", "stage=draft", "overwrite=true"], ["stage=draft"]),
        (["base=tiny", "prompt=a", "shard=1/2", "output=there"], ["shard=1/2"]),
        (["resume={folder}"], []),
        (["resume={folder}", "stage=refine", "pick=[1]", "steps=200"], ["stage=refine", "pick=[1]", "steps=200"]),
        (["prompt=it's, new", "resume={folder}", "hydra.run.dir=x"], ["prompt=it's, new"]),
    ],
)
def test_the_part_of_the_run_and_changed_options_are_given_again(typed, again, tmp_path, monkeypatch):
    record = {"overrides": ["base=tiny", "prompt=a", "output=there"], "config": {}}
    (tmp_path / RECORD).write_text(json.dumps(record))
    typed = [argument.format(folder=tmp_path) for argument in typed]
    monkeypatch.setattr(sys, "orig_argv", ["python", "src/generate.py", *typed])
    resume_pictures(quote_text_options(typed))
    assert list(typed_again()) == again, "as it was typed, not as Hydra is given it"
