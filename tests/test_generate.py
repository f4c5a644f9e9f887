"""`src/generate.py` as a person runs it, on a small random base."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import commands
import pytest
import torch
from hydra.utils import instantiate
from rich.console import Console
from safetensors import safe_open
from small_bases import SETTINGS
from training_runs import ROOT, command_environment

from scale_dit.device import choose_device
from scale_dit.errors import UserError
from scale_dit.generation import Loras, Picture, Sampling, generate
from scale_dit.method import Method
from scale_dit.picture_files import load_picture, read_provenance

PROMPT = 'a "large" (red) circle, it\'s a=b [c] ${d} \\'
METHOD = Method(order="hilbert")
PICTURES = [Picture(index, PROMPT, "", index, 128, 256) for index in range(2)]


def options(folder: Path, *arguments: str) -> list[str]:
    geometry = {name: getattr(SETTINGS, name) for name in ("name", "native", "text_length", "steps")}
    base = [f"base.{name}={value}" for name, value in geometry.items()]
    return ["base=tiny", f"hydra.run.dir={folder}/log", *base, "lora.path=none", *arguments]


def quiet() -> Console:
    return Console(quiet=True)


def test_the_command_makes_the_pictures(small_folder, tmp_path):
    prompts = tmp_path / "prompts (1), new.jsonl"
    prompts.write_text(json.dumps({"prompt": PROMPT, "seed": 5}) + "\n{broken\n")
    arguments = options(
        tmp_path, f"base.path={small_folder}", f"prompts_file={prompts}", "n=2", "height=128", "width=256",
        "output=out", f"negative_prompt={PROMPT}",
    )  # fmt: skip
    ran = subprocess.run(
        [sys.executable, str(ROOT / "src" / "generate.py"), *arguments],
        cwd=tmp_path, capture_output=True, text=True, env=command_environment(),
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    files = [tmp_path / "out" / f"0000{i}_seed{5 + i}.png" for i in range(2)]
    assert [load_picture(file).shape for file in files] == [(3, 128, 256)] * 2
    assert ran.stdout.splitlines()[-2:] == [f"out/{file.name}" for file in files]
    provenance = read_provenance(files[1])
    assert provenance is not None
    assert provenance["prompt"] == provenance["negative_prompt"] == PROMPT
    assert provenance["settings"]["base"]["name"] == "small"
    assert provenance["decode"] in ("whole", "streamed")
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["config"]["negative_prompt"] == PROMPT
    assert shlex.split(record["command"])[-1] == f"negative_prompt={PROMPT}", "as it was typed"
    assert "prompts (1), new.jsonl, line 2" in ran.stdout + ran.stderr


def test_missing_weights_are_said_before_anything_else(tmp_path):
    arguments = options(tmp_path, "base.path=nowhere/at-all", "height=1")
    ran = commands.run("generate.py", *arguments, cwd=tmp_path)
    assert ran.returncode == 2
    assert "base=tiny" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_negative_prompt_that_nothing_reads_is_said_before_weights_are_loaded(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a ring", "negative_prompt": "blur"}\n')
    run = (f"hydra.run.dir={tmp_path}/log", "lora.path=nowhere", "draft_guidance_scale=1")
    for given in (("prompt=a ring", "negative_prompt=blur"), (f"prompts_file={tmp_path}/p.jsonl",)):
        ran = commands.run("generate.py", "base=tiny", *run, *given)
        assert "nothing reads the negative prompt of 1 of 1 pictures" in ran.stdout
        assert "nowhere does not exist" in ran.stderr


@pytest.mark.slow
def test_ctrl_c_keeps_every_step_and_resume_needs_nothing_else(small_folder, tmp_path):
    arguments = (f"base.path={small_folder}", f"prompt={PROMPT}", "height=128", "width=256", "steps=100", "output=out")
    started = commands.start("generate.py", *options(tmp_path, *arguments, "save_every=1"), cwd=tmp_path)
    latents = tmp_path / "out" / "latents" / "00000_seed0.refine.safetensors"
    deadline = time.monotonic() + 120
    while not latents.is_file() and time.monotonic() < deadline:
        time.sleep(0.1)
    started.send_signal(signal.SIGINT)
    status, output, errors = started.wait(60)
    assert status == 130
    assert f"python {ROOT}/src/generate.py resume=out" in output
    assert "again with the same command" not in errors
    with safe_open(latents, framework="pt") as file:
        assert 0 < int(file.metadata()["step"]) < 100
    resumed = commands.run("generate.py", "resume=out", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    picture = tmp_path / "out" / "00000_seed0.png"
    provenance = read_provenance(picture)
    assert provenance is not None
    assert provenance["negative_prompt"] == ""
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert len(record["resumed"]) == 1
    whole = generate(
        [Picture(0, PROMPT, "", 0, 128, 256)], instantiate(record["config"]["base"]),
        instantiate(record["config"]["method"]), Sampling(steps=100), tmp_path / "whole", console=quiet(),
    )  # fmt: skip
    assert torch.equal(load_picture(whole[0]), load_picture(picture))


@pytest.mark.slow
def test_two_processes_share_a_prompt_file_without_doubling(small_folder, tmp_path):
    (tmp_path / "p.txt").write_text("\n".join(f"picture {index}" for index in range(4)))
    arguments = (f"base.path={small_folder}", "prompts_file=p.txt", "height=128", "width=256", "steps=8", "output=out")
    started = [
        commands.start(
            "generate.py", *options(tmp_path, *arguments, f"hydra.run.dir={tmp_path}/log{number}"), cwd=tmp_path
        )
        for number in range(2)
    ]
    answers = [process.wait() for process in started]
    assert [answer.returncode for answer in answers] == [0, 0], answers
    made = [sum(int(number) for number in re.findall(r"actual, (\d+) pictures", answer.stdout)) for answer in answers]
    assert sum(made) == 4, made
    assert len(list(tmp_path.glob("out/*.png"))) == 4
    assert len((tmp_path / "out" / "pictures.jsonl").read_text().splitlines()) == 4


def test_the_same_settings_make_the_same_picture_and_go_on_where_they_stopped(small_settings, tmp_path):
    options = {"sampling": Sampling(draft_steps=1), "console": quiet()}
    whole = generate(PICTURES, small_settings, METHOD, output=tmp_path / "whole", **options)
    pixels = [load_picture(file) for file in whole]
    assert not torch.equal(*pixels)
    again = generate(PICTURES[:1], small_settings, METHOD, output=tmp_path / "again", **options)
    assert torch.equal(load_picture(again[0]), pixels[0])

    (tmp_path / "whole" / "pictures.jsonl").unlink()
    whole[1].unlink()
    written = whole[0].stat().st_mtime_ns
    generate(PICTURES, small_settings, METHOD, output=tmp_path / "whole", **options)
    assert whole[0].stat().st_mtime_ns == written
    assert torch.equal(load_picture(whole[1]), pixels[1])


def test_a_finished_folder_is_refused_before_weights_are_loaded(small_settings, tmp_path):
    (tmp_path / "pictures.jsonl").write_text("")
    with pytest.raises(UserError, match="finished run"):
        generate(PICTURES, small_settings, METHOD, Sampling(), tmp_path, console=quiet())


def test_a_lora_that_is_none_is_refused(small_settings, tmp_path):
    (tmp_path / "lora.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="cannot be read"):
        generate(PICTURES, small_settings, METHOD, Sampling(), tmp_path, loras=Loras(tmp_path / "lora.safetensors"))


def test_devices():
    assert choose_device("cpu") == (torch.device("cpu"), torch.float32)
    assert choose_device("cpu", "bfloat16")[1] == torch.bfloat16
    with pytest.raises(UserError, match="unknown dtype 'float8'"):
        choose_device("cpu", "float8")
    for device in ("cuda:99", "abacus"):
        with pytest.raises(UserError, match="device=auto"):
            choose_device(device)
