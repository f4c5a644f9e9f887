"""The plan of a run: shown before weights are loaded, refused in time, held against what happened."""

from __future__ import annotations

import re
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from rich.console import Console

from scale_dit.errors import UserError
from scale_dit.generation import DraftPhoto, Files, FinishedPicture, Picture, Remake, Sampling, generate
from scale_dit.generation.job import Job
from scale_dit.method import Method
from scale_dit.picture_files import load_picture, save_picture
from scale_dit.planning.machine import find_machine
from scale_dit.planning.memory import Memory
from scale_dit.planning.predict import Prediction
from scale_dit.planning.report import before

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PICTURES = [Picture(index, "a large red circle on sand", "", index, 128, 256) for index in range(2)]
SAMPLING = Sampling(steps=2, draft_steps=1)


def run(settings, folder: Path, memory: Memory | None = None) -> str:
    """What the run prints; its pictures are in the folder."""
    console = Console(file=StringIO(), width=200)
    generate(PICTURES, settings, Method(), SAMPLING, folder, memory=memory, console=console, device="cpu")
    return console.file.getvalue()


def test_plan_and_outcome_are_printed(small_settings, tmp_path):
    printed = run(small_settings, tmp_path / "out")
    assert "Plan: 256 x 128 px, one of 2" in printed
    assert "memory.offload=none" in printed
    before, after = printed.split("Predicted and actual, 2 pictures")
    for stage in ("text", "draft", "refine", "decode", "in all"):
        assert re.search(rf"{stage}\W+[\d.]+", before)
        assert re.search(rf"{stage}\W+[\d.]+\W+[\d.]+", after), "seconds predicted and measured"


def test_what_happens_once_is_planned_once(small_settings, tmp_path, monkeypatch):
    """Libraries are loaded for the first picture, and the same prompt is encoded beforehand for both."""
    machine = replace(find_machine(torch.device("cpu"), torch.float32), text_launch=0.01, first_encoding=50.0)
    monkeypatch.setattr("scale_dit.planning.run.machine_of", lambda *_: machine)
    told = [run(small_settings, tmp_path / offload, Memory(offload)) for offload in ("none", "text")]
    each, once = (rows(printed)["text"][0] - 50 for printed in told)
    assert once > 0.5
    assert each == pytest.approx(2 * once, abs=0.2)
    shown = re.search(r"text\W+([\d.]+)", told[0].split("Predicted and actual")[0])
    assert shown is not None
    assert float(shown[1]) == pytest.approx(50 + once, abs=0.1), "the plan is a first picture's"


@pytest.mark.parametrize(("mode", "told"), [("tiled", True), ("streamed", False)])
def test_a_plan_with_tiles_says_how_far_they_are_off(mode, told):
    prediction = Prediction(4096, 4096, Memory(decode=mode), {"decode": 1.0}, {"decode": 10**9})
    caption = before(prediction, 1, 10**10, "a card").caption
    assert f"memory.decode={mode}" in caption
    assert ("levels of 255" in caption) == told


def test_drafts_are_planned_as_what_they_are(small_settings, tmp_path):
    """They were planned as the pictures that may be made of them: refused where those would not fit."""
    console = Console(file=StringIO(), width=200)
    large = [replace(PICTURES[0], height=4096, width=4096)]
    generate(
        large, small_settings, Method(), replace(SAMPLING, scale=32.0), tmp_path, job=Job("draft"),
        memory=Memory(limit_gb=0.6), console=console, device="cpu",
    )  # fmt: skip
    printed = console.file.getvalue()
    assert "refine" not in printed
    before, after = printed.split("Predicted and actual, 1 pictures")
    for stage in ("text", "draft", "decode"):
        assert re.search(rf"{stage}\W+[\d.]+", before)
        assert re.search(rf"{stage}\W+[\d.]+\W+[\d.]+", after)


def rows(printed: str) -> dict[str, list[float]]:
    """Seconds predicted and measured of each stage, from the last table."""
    table = printed.split("Predicted and actual")[1]
    found = re.findall(r"(text|draft|refine|decode)\W+([\d.]+)\W+([\d.]+)", table)
    return {stage: [float(predicted), float(actual)] for stage, predicted, actual in found}


def test_pictures_that_are_encoded_are_planned_in_the_drafts_stage(small_settings, tmp_path):
    """A photo was planned as a draft that the base makes, and a picture to make anew as nothing."""
    save_picture(torch.rand(3, 512, 512, generator=torch.Generator().manual_seed(0)), tmp_path / "a.png")
    pictures = [replace(PICTURES[0], height=512, width=512)]

    def stages(name: str, **options) -> dict[str, list[float]]:
        console, sampling = Console(file=StringIO(), width=200), replace(SAMPLING, start=0.5)
        generate(
            pictures, small_settings, Method(), sampling, tmp_path / name, files=Files(keep_latents=True),
            console=console, device="cpu", **options,
        )  # fmt: skip
        return rows(console.file.getvalue())

    drafted = stages("drafted")
    by_photo = stages("photo", photo=DraftPhoto(tmp_path / "a.png"))
    foreign = stages("foreign", remake=Remake(FinishedPicture(tmp_path / "a.png"), [[0, 0, 8, 8]]))
    kept = stages("kept", remake=Remake(FinishedPicture(tmp_path / "drafted" / "00000_seed0.png"), [[0, 0, 8, 8]]))
    assert by_photo["draft"][0] == foreign["draft"][0] != drafted["draft"][0]
    assert "draft" not in kept
    for found in (by_photo, foreign):
        off = {stage: actual / predicted for stage, (predicted, actual) in found.items()}
        assert 1 / 10 < off["draft"] / off["decode"] < 10, "about as far off as decoding is, on any machine"


def test_all_ways_make_the_same_pictures(small_settings, tmp_path):
    run(small_settings, tmp_path / "plain")
    expected = [load_picture(file) for file in sorted((tmp_path / "plain").glob("*.png"))]
    for offload in ("text", "group"):
        run(small_settings, tmp_path / offload, Memory(offload, 0, "host"))
        found = [load_picture(file) for file in sorted((tmp_path / offload).glob("*.png"))]
        assert all((one == other).all() for one, other in zip(found, expected, strict=True))


def test_what_does_not_fit_is_refused_before_weights_are_loaded(small_folder, small_settings, tmp_path):
    """The folder has the configs and no weights, so that loading would fail otherwise."""
    for config in small_folder.rglob("*.json"):
        copy = tmp_path / "base" / config.relative_to(small_folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(config.read_text())
    settings = replace(small_settings, path=str(tmp_path / "base"))
    with pytest.raises(UserError, match="256 x 128 px needs"):
        run(settings, tmp_path / "out", Memory(limit_gb=0.05))


@pytest.mark.parametrize("choice", [path.stem for path in sorted((CONFIGS / "memory").glob("*.yaml"))])
def test_configs_compose(choice):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("generate", [f"memory={choice}", "memory.limit_gb=24"])
    memory = instantiate(config.memory)
    assert isinstance(memory, Memory)
    assert memory.limit_gb == 24
    assert list(memory.ways(on_gpu=True))
