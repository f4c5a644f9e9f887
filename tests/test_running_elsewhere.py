"""Commands in other folders than the project's, and going on in a folder from another place than it was made from."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import commands
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from small_bases import SETTINGS
from training_runs import ROOT, command_environment, overrides

from scale_dit.overrides import seen_from
from scale_dit.provenance import path_of_project
from scale_dit.resuming import remake_arguments, resume_pictures, resume_training
from scale_dit.run_folder import FINISHED, LAST

GEOMETRY = [f"base.{name}={getattr(SETTINGS, name)}" for name in ("name", "native", "text_length", "steps")]


@pytest.fixture
def places(tmp_path: Path, small_folder: Path) -> tuple[Path, Path]:
    """Two working directories; a base and a file of prompts lie in the first."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    (first / "weights").symlink_to(small_folder)
    (first / "p.txt").write_text("a ring\na star\n")
    return first, second


def in_first(*arguments: str) -> list[str]:
    size = ["height=128", "width=256", "lora.path=none"]
    return ["base=tiny", "base.path=weights", *GEOMETRY, "prompts_file=p.txt", *size, *arguments]


@pytest.mark.slow
def test_what_comes_with_the_project_is_found_and_outputs_stay_where_one_is(tmp_path):
    options = ("base=tiny", "prompt=a red ring", "height=256", "width=256", "steps=1", "draft_steps=1", "scale=1")
    ran = commands.run("generate.py", *options, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    (picture,) = tmp_path.glob("logs/generate/runs/*/00000_seed0.png")
    assert ran.stdout.splitlines()[-1] == str(picture)
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "more"),
    [
        ("train.py", ("experiment=scale_dit_4k", "trainer.max_steps=1", "data.count=2", "data.batch_size=1",
                      "trainer.accelerator=cpu", "logger=csv", "callbacks.samples=null", "callbacks.progress=null")),
        ("eval.py", ("n=1", "scale=2", "steps=1", "draft_steps=1", "logger=csv", "device=cpu")),
    ],
)  # fmt: skip
def test_training_and_evaluation_run_anywhere(script, more, tmp_path):
    ran = commands.run(script, "base=tiny", *more, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]
    assert list(tmp_path.glob("logs/*/runs/*/run.json"))


def test_the_assets_are_relative_in_the_project_and_absolute_elsewhere(tmp_path, monkeypatch):
    def assets() -> str:
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            return compose("generate", ["base=tiny"]).base.path

    monkeypatch.chdir(ROOT)
    assert (path_of_project(), assets()) == (".", "./assets/tiny-flux")
    monkeypatch.chdir(tmp_path)
    assert (path_of_project(), assets()) == (str(ROOT), str(ROOT / "assets" / "tiny-flux"))


def test_without_a_checkout_assets_are_looked_for_where_one_is(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "scale_dit.provenance.__file__", str(tmp_path / "site-packages" / "scale_dit" / "provenance.py")
    )
    (tmp_path / "pyproject.toml").touch()  # of another project, around the environment
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert path_of_project() == "."
    monkeypatch.chdir(ROOT / "docs")
    assert path_of_project() == str(ROOT)


@pytest.mark.slow
def test_pictures_go_on_from_another_folder(places):
    first, second = places
    drafted = commands.run("generate.py", *in_first("stage=draft", "output=out"), cwd=first)
    assert drafted.returncode == 0, drafted.stderr
    (first / "out" / "drafts" / "00001_seed0.png").unlink()
    resumed = commands.run("generate.py", "resume=../first/out", "pick=[1]", "stage=refine", cwd=second)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.splitlines()[-1] == f"{second}/../first/out/00001_seed0.png"
    whole = commands.run("generate.py", f"resume={first}/out", cwd=second)
    assert whole.returncode == 0, whole.stderr
    assert "1 of 2 pictures are there already" in whole.stdout
    assert (first / "out" / "pictures.jsonl").is_file()
    assert not any(second.iterdir())
    record = json.loads((first / "out" / "run.json").read_text())
    assert record["directory"] == str(first)
    assert record["resumed"][-1]["command"] == f"python src/generate.py resume={first}/out"


@pytest.mark.slow
def test_training_goes_on_from_another_folder(places):
    first, second = places
    options = overrides(Path("weights"), "hydra.run.dir=run", "trainer.max_steps=100000")
    started = commands.start("train.py", *options, cwd=first)
    deadline = time.monotonic() + 120
    while not (first / "run" / "metrics.csv").is_file() and time.monotonic() < deadline:
        time.sleep(0.1)
    started.send_signal(signal.SIGINT)
    assert started.wait(60).returncode == 130
    step = torch.load(first / "run" / LAST)["global_step"]
    resumed = commands.run("train.py", "resume=../first/run", f"trainer.max_steps={step + 1}", cwd=second)
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads((first / "run" / FINISHED).read_text())["steps"] == step + 1
    assert not any(second.iterdir())


def write_record(folder: Path, directory: Path | None, *first: str) -> None:
    folder.mkdir()
    record = {"overrides": list(first), "config": {}} | ({} if directory is None else {"directory": str(directory)})
    (folder / "run.json").write_text(json.dumps(record))


def test_what_is_given_now_is_seen_from_here(places, monkeypatch):
    first, second = places
    write_record(first / "out", first, "base.path=weights", "prompts_file=p.txt", "output=out")
    (second / "new, more.txt").touch()
    monkeypatch.chdir(second)
    monkeypatch.setattr(sys, "argv", ["../generate.py"])
    given = ["resume='../first/out'", "prompts_file='new, more.txt'", "base.path=org/model", "pick=[1]"]
    values = parsed(resume_pictures(given))
    assert Path.cwd() == first
    assert sys.argv[0] == str(second.parent / "generate.py")
    assert values == {
        "base.path": "org/model",
        "prompts_file": f"{second}/new, more.txt",
        "output": f"{second}/../first/out",
        "resume": f"{second}/../first/out",
        "pick": [1],
    }


@pytest.mark.parametrize("directory", [None, Path("/no/longer/here")])
def test_a_folder_whose_place_is_not_known_goes_on_where_one_is(directory, places, monkeypatch):
    first, second = places
    write_record(first / "out", directory, "prompts_file=p.txt")
    (first / "out" / LAST).parent.mkdir()
    (first / "out" / LAST).touch()
    monkeypatch.chdir(second)
    for resume in (resume_pictures, resume_training):
        assert "prompts_file=p.txt" in resume([f"resume={first}/out", "trainer.max_steps=3"])
        assert Path.cwd() == second


def test_a_picture_is_made_anew_in_another_folder(places, monkeypatch):
    first, second = places
    (first / "style.safetensors").touch()
    style = "style_loras=[{path: style.safetensors, weight: 0.8, name: s}]"
    write_record(first / "out", first, "base.path=weights", "lora.path=none", style, "prompts_file=p.txt")
    monkeypatch.chdir(second)
    values = parsed(remake_arguments([f"remake='{first}/out/0.png'", "mask=mask.png"]))
    assert Path.cwd() == second
    assert values == {
        "base.path": f"{first}/weights",
        "lora.path": "none",
        "style_loras": [{"path": f"{first}/style.safetensors", "weight": 0.8, "name": "s"}],
        "remake": f"{first}/out/0.png",
        "mask": "mask.png",
    }


def parsed(arguments: list[str]) -> dict:
    found = OverridesParser.create().parse_overrides(arguments)
    return {override.get_key_element(): override.value() for override in found}


def test_only_paths_are_made_absolute(tmp_path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "it's").mkdir()
    for override in (
        "base=tiny", "prompt=tiny", "~logger", "--cfg", "lora.path=none", "lora.path=null", "data.path=a,b", "x=[1",
        "lora.path=${paths.log_dir}/x", "data.path=/tiny", "base.path=org/model",
    ):  # fmt: skip
        assert seen_from(tmp_path, override) == override
    assert parsed([seen_from(tmp_path, "+data.path=tiny")]) == {"+data.path": f"{tmp_path}/tiny"}
    assert parsed([seen_from(tmp_path, 'vae="it\'s"')]) == {"vae": f"{tmp_path}/it's"}
    assert parsed([seen_from(tmp_path, "output=new")]) == {"output": f"{tmp_path}/new"}
    assert parsed([seen_from(tmp_path, "x={path: tiny, n: null, on: true}")])["x"] == {
        "path": f"{tmp_path}/tiny", "n": None, "on": True,
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("script", ["generate.py", "train.py", "eval.py"])
@pytest.mark.parametrize("module", ["hydra.errors", "torch._C"])
def test_ctrl_c_during_the_imports(script, module, tmp_path):
    """Python reports every import when it is done; so the signal comes where it is meant to on any machine."""
    started = subprocess.Popen(
        [sys.executable, "-X", "importtime", str(ROOT / "src" / script), "base=tiny"],
        cwd=tmp_path, env=command_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert any(line.split("|")[-1].strip() == module for line in started.stderr)
    started.send_signal(signal.SIGINT)
    output, errors = started.communicate(timeout=60)
    assert (started.returncode, output) == (130, "")
    said = [line for line in errors.splitlines() if line and not line.startswith("import time:")]
    assert said == ["Interrupted. Start again with the same command."]


def test_a_list_without_brackets_is_said():
    for given in ("pick=3,7", "pick=3, 7,"):
        ran = commands.run("generate.py", given, "prompt=a ring")
        assert ran.returncode == 2
        assert "use 'pick=[3,7]'" in ran.stderr
        assert "Traceback" not in ran.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "absent"), [("entry", ("torch", "lightning")), ("generation.command", ("lightning", "torchmetrics"))]
)
def test_what_takes_long_to_import_is_left_to_those_who_use_it(module, absent):
    code = f"import sys, scale_dit.{module}; print([name for name in {absent} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=command_environment())
    assert ran.stdout == "[]\n", ran.stderr
