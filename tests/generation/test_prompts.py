"""Any prompt text reaches the config to the letter, and a broken line of a file costs that line alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from scale_dit.errors import UserError
from scale_dit.generation import Prompt, read_prompts
from scale_dit.overrides import quote_text_options

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
HARD = "a \"large\" (red) circle, it's a=b [c] {d: e} ${f} \\${g} \\' 100% #1 ~x @y | é 日本\\"
PARSER = OverridesParser.create()


def through_hydra(*arguments: str):
    """The value that Hydra and OmegaConf make of `arguments`, of which one is left after quoting."""
    (quoted,) = quote_text_options(list(arguments))
    config = OmegaConf.create({"prompt": None})
    OmegaConf.update(config, "prompt", PARSER.parse_override(quoted).value())
    return OmegaConf.to_container(config, resolve=True)["prompt"]


# Surrogates cannot be typed, and a null character cannot be in an argument.
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
grammar = st.text(alphabet="\\'\"${}[](),=:a \n#~|")


@given(texts | grammar)
@example(HARD)
@example("null")
@example("1e3")
@example("[a, b]")
@example("\\")
@settings(deadline=None, max_examples=150)
def test_any_text_comes_out_as_it_went_in(text):
    assert through_hydra("prompt=" + text) == text


@given(st.lists(texts | grammar, min_size=2, max_size=4))
@settings(deadline=None, max_examples=50)
def test_an_option_that_is_given_again_makes_a_list(several):
    assert through_hydra(*("prompt=" + text for text in several)) == several


def test_a_json_list_makes_a_list_and_anything_else_in_brackets_is_text():
    assert through_hydra('prompt=["a, b", "c"]') == ["a, b", "c"]
    assert through_hydra('prompt=["one"]') == ["one"]
    assert through_hydra("prompt=[masterpiece], a cat") == "[masterpiece], a cat"
    assert through_hydra("prompt=[1, 2]") == "[1, 2]"


def test_other_arguments_pass_unchanged():
    arguments = ["--multirun", "base=tiny", "seed=1,2", "data.prompt=x,y", "+experiment=a"]
    assert quote_text_options(arguments) == arguments


def test_the_whole_config_takes_a_hard_prompt():
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("generate", quote_text_options(["base=tiny", f"prompt={HARD}", f"negative_prompt={HARD}"]))
    assert config.prompt == HARD
    assert config.negative_prompt == HARD


def test_text_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufefffirst, with comma\r\n\r\n  second = 'quoted' \nthird".encode())
    found = read_prompts(path)
    assert [prompt.text for prompt in found.prompts] == ["first, with comma", "second = 'quoted'", "third"]
    assert found.prompts[2].source == "prompts.txt, line 4"
    assert not found.broken


def test_a_line_of_text_that_begins_with_a_hash_is_a_comment(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("# circles\na circle\n  #a star\nshop no. #1\n")
    found = read_prompts(path)
    assert [(prompt.text, prompt.source) for prompt in found.prompts] == [
        ("a circle", "prompts.txt, line 2"),
        ("shop no. #1", "prompts.txt, line 4"),
    ]
    assert not found.broken
    path.write_text("# a circle\n")
    with pytest.raises(UserError, match="comments"):
        read_prompts(path)
    (tmp_path / "prompts.csv").write_text("prompt\n#1 in the list\n")
    assert read_prompts(tmp_path / "prompts.csv").prompts[0].text == "#1 in the list"


def test_json_lines(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '"just text"\n'
        '{"prompt": "all", "seed": 3, "height": 256, "width": 512, "negative_prompt": "blur", "file": "x.png"}\n'
        '{"prompt": "unfinished\n'
        '{"text": "no prompt"}\n'
        '{"prompt": "odd seed", "seed": 1.5}\n'
        '{"prompt": "negative", "seed": -1}\n'
        "[1]\n"
        '{"prompt": "last", "colour": "red"}\n'
    )
    found = read_prompts(path)
    assert found.prompts == [
        Prompt("just text", source="prompts.jsonl, line 1"),
        Prompt("all", 3, 256, 512, "blur", source="prompts.jsonl, line 2"),
        Prompt("last", source="prompts.jsonl, line 8"),
    ]
    assert [line.split(":")[0] for line in found.broken] == [f"prompts.jsonl, line {i}" for i in (3, 4, 5, 6, 7)]
    assert "1.5" in found.broken[2]
    assert found.unknown_fields == ["text", "colour"]


def test_brackets_in_brackets_cost_their_line_alone(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("[" * 200_000 + '\n"a ring"\n')
    found = read_prompts(path)
    assert [prompt.text for prompt in found.prompts] == ["a ring"]
    assert [line.split(":")[0] for line in found.broken] == ["prompts.jsonl, line 1"]


def test_csv(tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_text(
        'prompt, seed,height\n"a, b",7,\nno quotes, here, at all, too many\n'
        '"said ""hello""",,128\nbad,x,\n,1,\nlast,,\n'
    )
    found = read_prompts(path)
    assert [(prompt.text, prompt.seed, prompt.height) for prompt in found.prompts] == [
        ("a, b", 7, None),
        ('said "hello"', None, 128),
        ("last", None, None),
    ]
    assert [line.split(":")[0] for line in found.broken] == [f"prompts.csv, line {i}" for i in (3, 5, 6)]
    assert "quotation marks" in found.broken[0]


@pytest.mark.parametrize(
    ("rest", "texts"),
    [
        ("next,3\nlast,4\n", ["next", "last"]),
        ('next,3\n"quoted, last",4\n', ["next", "quoted, last"]),
        ('\n"over\ntwo lines",3\n', ["over\ntwo lines"]),
        ("", []),
    ],
)
def test_a_quotation_mark_that_is_not_closed_costs_its_line_alone(tmp_path, rest, texts):
    path = tmp_path / "prompts.csv"
    path.write_text(f'prompt,seed\ngood,1\n"never closed,2\n{rest}')
    found = read_prompts(path)
    assert [prompt.text for prompt in found.prompts] == ["good", *texts]
    if "two" in rest:
        assert found.prompts[-1].source == "prompts.csv, line 5"
    assert len(found.broken) == 1
    assert found.broken[0].startswith("prompts.csv, line 3")
    assert "closed" in found.broken[0]


def test_large_seeds_are_not_rounded(tmp_path):
    path, largest = tmp_path / "prompts.jsonl", 2**63 - 1
    path.write_text("".join(json.dumps({"prompt": "a", "seed": seed}) + "\n" for seed in (largest, largest + 1, 1e400)))
    found = read_prompts(path)
    assert [prompt.seed for prompt in found.prompts] == [largest]
    assert f"from 0 to {largest}" in found.broken[0]
    assert "no whole number" in found.broken[1]


def test_bytes_that_are_no_text_cost_their_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"good\nbad \xff\xfe\nalso good\n")
    found = read_prompts(path)
    assert [prompt.text for prompt in found.prompts] == ["good", "also good"]
    assert found.broken == ["prompts.txt, line 2: prompt is not UTF-8"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "\n  \n", "it is empty"),
        ("broken.jsonl", "{\n", "line 1"),
        ("columns.csv", "text,seed\na,1\n", "no column 'prompt'"),
        ("empty.csv", "", "no column 'prompt'"),
        ("prompts.docx", "a", r"\.txt, \.jsonl, \.csv"),
        ("missing.txt", None, "cannot be read: No such file"),
    ],
)
def test_files_without_a_prompt_are_refused(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_prompts(path)


def test_a_folder_is_no_prompt_file(tmp_path):
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_prompts(tmp_path / "folder.txt")
