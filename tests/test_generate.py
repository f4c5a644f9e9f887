"""`src/generate.py` as a person runs it, on a small random base."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from small_bases import SETTINGS

from scale_dit.device import choose_device
from scale_dit.errors import UserError
from scale_dit.evaluation.pictures import load_picture, read_provenance
from scale_dit.generation import Picture, Sampling, generate
from scale_dit.method import Method

ROOT = Path(__file__).resolve().parents[1]
PROMPT = 'a "large" (red) circle, it\'s a=b [c] ${d} \\'
OFFLINE = os.environ | {"HF_HUB_OFFLINE": "1"}
METHOD = Method(order="hilbert")
PICTURES = [Picture(index, PROMPT, "", index, 128, 256) for index in range(2)]


def command(folder: Path, *arguments: str) -> list[str]:
    geometry = {name: getattr(SETTINGS, name) for name in ("name", "native", "text_length", "steps")}
    base = [f"base.{name}={value}" for name, value in geometry.items()]
    program = [sys.executable, str(ROOT / "src" / "generate.py"), "base=tiny", f"hydra.run.dir={folder}/log", *base]
    return [*program, "lora.path=none", *arguments]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(folder, *arguments), cwd=folder, capture_output=True, text=True, env=OFFLINE)


def quiet() -> Console:
    return Console(quiet=True)


def test_the_command_makes_the_pictures(small_folder, tmp_path):
    prompts = tmp_path / "prompts (1), new.jsonl"
    prompts.write_text(json.dumps({"prompt": PROMPT, "seed": 5}) + "\n{broken\n")
    ran = run(
        tmp_path, f"base.path={small_folder}", f"prompts_file={prompts}", "n=2", "height=128", "width=256",
        "output=out", f"negative_prompt={PROMPT}",
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
    ran = run(tmp_path, "base.path=nowhere/at-all", "height=1")
    assert ran.returncode == 2
    assert "base=tiny" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_ctrl_c_says_how_to_go_on(small_folder, tmp_path):
    arguments = (f"base.path={small_folder}", "prompt=a", "n=500", "height=128", "width=128", "output=out")
    started = subprocess.Popen(
        command(tmp_path, *arguments), cwd=tmp_path, stdout=subprocess.PIPE, env=OFFLINE, text=True,
        # where the tests themselves run in a shell's background, Ctrl-C is ignored, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("out/*.png")) and time.monotonic() < deadline:
        time.sleep(0.1)
    started.send_signal(signal.SIGINT)
    output, _ = started.communicate(timeout=60)
    assert started.returncode == 130
    assert "The same command with output=out goes on." in output
    assert 0 < len(list(tmp_path.glob("out/*.png"))) < 500
    assert not (tmp_path / "out" / "pictures.jsonl").exists()


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
        generate(PICTURES, small_settings, METHOD, Sampling(), tmp_path, lora=tmp_path / "lora.safetensors")


def test_devices():
    assert choose_device("cpu") == (torch.device("cpu"), torch.float32)
    assert choose_device("cpu", "bfloat16")[1] == torch.bfloat16
    with pytest.raises(UserError, match="unknown dtype 'float8'"):
        choose_device("cpu", "float8")
    for device in ("cuda:99", "abacus"):
        with pytest.raises(UserError, match="device=auto"):
            choose_device(device)
