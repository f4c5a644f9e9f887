"""What the documents tell a person to type is there: commands compose, targets and linked files exist."""

from __future__ import annotations

import re
import shlex
from itertools import product
from pathlib import Path

import hydra
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

from scale_dit.method import Method
from scale_dit.models.settings import BaseSettings
from scale_dit.overrides import quote_text_options

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "experiments").glob("*/README.md")),
]
ENTRY_POINTS = ("train", "eval", "generate", "make_pairs", "benchmark")


def command_lines() -> list[tuple[str, list[str]]]:
    """(entry point, arguments) of every `python src/...` line in a block of code, continued lines joined."""
    found = {}
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8").replace("\\\n", " ")
        for match in re.finditer(r"^\s*python src/(\w+)\.py +(.+)$", text, re.MULTILINE):
            found[match[0].strip()] = (match[1], shlex.split(match[2], comments=True))
    return list(found.values())


def jobs(arguments: list[str]) -> list[list[str]]:
    """The overrides of every job of a sweep; one job without `--multirun`."""
    if "--multirun" not in arguments:
        return [arguments]
    overrides = OverridesParser.create().parse_overrides([a for a in arguments if a != "--multirun"])
    choices = [
        [f"{o.get_key_element()}={value}" for value in o.sweep_string_iterator()]
        if o.is_sweep_override()
        else [o.input_line]
        for o in overrides
    ]
    return [list(job) for job in product(*choices)]


@pytest.mark.parametrize(("entry_point", "arguments"), command_lines(), ids=lambda value: str(value)[:60])
def test_commands_compose(entry_point, arguments):
    assert entry_point in ENTRY_POINTS
    assert (ROOT / "src" / f"{entry_point}.py").is_file()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        for job in jobs(quote_text_options(arguments)):
            config = compose(entry_point, [o for o in job if not o.startswith("hydra.")], return_hydra_config=False)
            if entry_point == "benchmark":
                assert hydra.utils.instantiate(config.kernel, _convert_="all").run
                continue
            assert isinstance(hydra.utils.instantiate(config.base), BaseSettings)
            assert isinstance(hydra.utils.instantiate(config.method), Method)


def test_the_readme_holds_the_commands_that_matter():
    lines = {entry_point for entry_point, _ in command_lines()}
    assert {"train", "eval", "generate", "make_pairs"} <= lines
    assert [len(jobs(arguments)) for _, arguments in command_lines() if "--multirun" in arguments] == [8]


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        blocks = re.findall(r"`(make [a-z -]+)`|^(make [a-z -]+)", text, re.MULTILINE)
        named = {name for pair in blocks for name in "".join(pair).split()[1:]}
        assert named <= targets, f"{document.name} names {sorted(named - targets)}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_linked_files_exist(document):
    text = document.read_text(encoding="utf-8")
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert not [link for link in links if link and not (document.parent / link).exists()]
