"""The folder of a run: nothing is made twice, nothing foreign is overwritten, a full disk is said in one sentence."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from scale_dit.autoencoder import Decoding
from scale_dit.errors import UserError
from scale_dit.generation import Files, Picture, read_prompts
from scale_dit.generation.folder import FINISHED, OutputFolder
from scale_dit.picture_files import read_provenance
from scale_dit.pipeline_output import StageCost

PICTURES = [Picture(index, f'prompt, "{index}" = é', "", 10 + index, 16, 32) for index in range(3)]
COST, WHOLE = StageCost({"draft": 0.25, "refine": 1.0}), Decoding("whole")


def fill(folder: OutputFolder, pictures=PICTURES) -> None:
    for picture in pictures:
        folder.keep(picture, torch.rand(3, picture.height, picture.width).split(5, dim=1), COST, WHOLE)


def test_an_interrupted_run_makes_only_what_is_missing(tmp_path):
    folder = OutputFolder(tmp_path / "out", {"steps": 2})
    assert folder.pending(PICTURES) == PICTURES
    fill(folder, PICTURES[:2])
    assert folder.pending(PICTURES) == PICTURES[2:]


def test_half_a_picture_is_made_again(tmp_path):
    folder = OutputFolder(tmp_path, {})
    fill(folder)
    whole = folder.file(PICTURES[1])
    whole.write_bytes(whole.read_bytes()[:300])
    assert folder.pending(PICTURES) == [PICTURES[1]]


@pytest.mark.parametrize("change", ["settings", "prompt", "negative_prompt"])
def test_pictures_of_another_run_are_not_overwritten(tmp_path, change):
    fill(OutputFolder(tmp_path, {"steps": 2}))
    other = OutputFolder(tmp_path, {"steps": 3 if change == "settings" else 2})
    pictures = PICTURES if change == "settings" else [Picture(0, "x", "", 10, 16, 32)]
    if change == "negative_prompt":
        pictures = [Picture(0, PICTURES[0].prompt, "blur", 10, 16, 32)]
    with pytest.raises(UserError, match=r"other settings or another prompt.*overwrite=true"):
        other.pending(pictures)


@pytest.mark.parametrize("kind", ["draft", "refine"])
def test_steps_of_another_run_are_not_overwritten(tmp_path, kind):
    folder, other = (OutputFolder(tmp_path, {"sampling": {"draft_steps": steps}}) for steps in (2, 3))
    folder.save(PICTURES[1], kind, torch.zeros(1, 4, 2, 4), 1)
    assert folder.pending(PICTURES) == PICTURES
    with pytest.raises(UserError, match=rf"{kind}.safetensors are steps of other settings.*overwrite=true"):
        other.pending(PICTURES)
    folder.latents.file(f"{PICTURES[1].stem}.{kind}").write_bytes(b"half a file")
    assert other.pending(PICTURES) == PICTURES


def test_a_finished_run_is_refused_unless_it_may_be_removed(tmp_path):
    folder = OutputFolder(tmp_path, {"steps": 2})
    fill(folder)
    folder.finish(PICTURES)
    (tmp_path / "mine.png").write_bytes(b"not a picture of a run")
    with pytest.raises(UserError, match=r"finished run.*overwrite=true"):
        folder.pending(PICTURES)
    folder.clear(PICTURES[:1])
    assert folder.pending(PICTURES[:1]) == PICTURES[:1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["claims.lock", "mine.png"]


def test_a_folder_is_cleared_once_for_all_processes_of_a_run(tmp_path):
    """A process that began later removed what the others had just made."""
    fill(OutputFolder(tmp_path, {"steps": 3}))
    first, second = OutputFolder(tmp_path, {"steps": 2}), OutputFolder(tmp_path, {"steps": 2})
    first.clear(PICTURES)
    assert first.pending(PICTURES) == PICTURES
    fill(first, PICTURES[:1])
    second.clear(PICTURES)
    assert second.pending(PICTURES) == PICTURES[1:]
    fill(second, PICTURES[1:])
    second.finish(PICTURES)
    OutputFolder(tmp_path, {"steps": 2}).clear(PICTURES)
    assert first.pending(PICTURES) == PICTURES, "of a finished run"
    fill(first, PICTURES[:1])
    other = OutputFolder(tmp_path, {"steps": 2}, Files("webp"))
    other.clear(PICTURES)
    assert not first.holds(PICTURES[0]), "of another run"


def test_the_list_of_a_finished_run_is_a_prompt_file(tmp_path):
    folder = OutputFolder(tmp_path, {})
    fill(folder)
    found = read_prompts(folder.finish(PICTURES))
    assert not found.broken
    assert not found.unknown_fields
    assert [(p.text, p.seed, p.height, p.width) for p in found.prompts] == [
        (p.prompt, p.seed, p.height, p.width) for p in PICTURES
    ]
    assert json.loads((tmp_path / FINISHED).read_text().splitlines()[0])["seconds"] == 1.25


def test_a_picture_says_what_it_was_made_with(tmp_path):
    fill(OutputFolder(tmp_path, {"steps": 2, "lora": None}), PICTURES[:1])
    file = OutputFolder(tmp_path, {}).file(PICTURES[0])
    provenance = read_provenance(file)
    assert provenance is not None
    assert provenance["prompt"] == PICTURES[0].prompt
    assert provenance["settings"] == {"steps": 2, "lora": None}
    assert provenance["versions"]["torch"] == torch.__version__.split("+")[0]
    assert provenance["seconds"] == COST.seconds
    with Image.open(file) as picture:
        assert picture.size == (32, 16)


def test_a_disk_that_is_too_small_is_refused_beforehand(tmp_path):
    with pytest.raises(UserError, match="free some space and give the command again"):
        OutputFolder(tmp_path, {}).pending([Picture(0, "a", "", 0, 10**8, 10**8)])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_a_disk_that_fills_up_is_said_in_one_sentence(tmp_path):
    picture = PICTURES[0]
    partial = f".{picture.stem}.png.{os.getpid()}.part"
    for remedy in ("give the command again", r"go on with: .* resume="):
        os.symlink("/dev/full", tmp_path / partial)
        with pytest.raises(UserError, match=rf"the disk is full.*saved steps are kept.*{remedy}"):
            OutputFolder(tmp_path, {}).keep(picture, [torch.rand(3, 512, 512)], COST, WHOLE)
        (tmp_path / "run.json").write_text("{}")


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        OutputFolder(tmp_path / "file" / "out", {}).pending(PICTURES)
