"""What is picked or shared is the same picture, bit by bit, as in one undisturbed run."""

from __future__ import annotations

import io
import json
import multiprocessing
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from small_runs import BLOCK, CALLS_OF_GUIDANCE, METHOD, PICTURES, SAMPLING, Stop

from scale_dit.errors import UserError
from scale_dit.generation import Loras
from scale_dit.generation.claims import Claims
from scale_dit.generation.photo import DraftPhoto
from scale_dit.generation.setup import Setup
from scale_dit.picture_files import load_picture
from scale_dit.planning.memory import Memory


def test_nothing_is_loaded_where_a_stage_has_nothing_to_do(make):
    console = Console(file=io.StringIO(), width=200)
    assert make("out", stage="decode", console=console) == []
    assert "pictures without finished latents are left out: 0" in console.file.getvalue()
    make("drafts", stage="draft", console=console)
    assert "picture 1/1" in console.file.getvalue()
    console = Console(file=io.StringIO(), width=200)
    make("drafts", stage="draft", console=console)
    assert "picture 1/1" not in console.file.getvalue()


def test_other_weights_are_other_settings(small_settings, small_folder, tmp_path):
    """The transformer's file by what is in it, not by its name; weights in 8 bits make other pictures."""
    setup = Setup(
        small_settings, METHOD, SAMPLING, Loras(), None, "auto", torch.device("cpu"), torch.float32, Memory()
    )  # fmt: skip
    (weights,) = (small_folder / "transformer").glob("*.safetensors")
    file = shutil.copy(weights, tmp_path / "one.safetensors")
    given = replace(setup, base=replace(small_settings, transformer_file=str(file)))
    before = given.settings()
    state = load_file(file)
    state[min(state)] += 1
    save_file(state, file)
    after = given.settings()
    assert before["base"] == after["base"]
    assert before != after
    assert replace(setup, memory=Memory(weights="fp8")).settings() != setup.settings()
    assert replace(setup, memory=Memory("group", 4096, "host", "tiled")).settings() == setup.settings()


def test_picked_drafts_become_the_pictures_of_a_full_run(make, tmp_path, whole):
    (sheet,) = make("out", PICTURES, stage="draft")
    with Image.open(sheet) as image:
        assert image.size[0] > 2 * 256
    listed = json.loads((tmp_path / "out" / "contact_sheet.json").read_text())
    assert [(each["index"], each["seed"]) for each in listed] == [(0, 0), (1, 1), (2, 2), (3, 3)]
    previews = [load_picture(tmp_path / "out" / each["draft"]) for each in listed]
    assert not torch.equal(previews[0], previews[1])
    assert not list(tmp_path.glob("out/0*")), "no picture is made"
    with Stop(BLOCK, 2 * (CALLS_OF_GUIDANCE + 4 * 4) + 1, AssertionError("a draft is made twice")):
        files = make("out", PICTURES, stage="refine", pick=[3, 1])
    assert [file.name for file in files] == ["00001_seed1.png", "00003_seed3.png"]
    assert torch.equal(load_picture(files[0]), whole[1])
    assert torch.equal(load_picture(files[1]), whole[3])
    (more,) = make("out", PICTURES, stage="refine", pick=0)
    assert torch.equal(load_picture(more), whole[0])
    lines = (tmp_path / "out" / "pictures.jsonl").read_text().splitlines()
    assert [json.loads(line)["seed"] for line in lines] == [0, 1, 3]
    make("out", [*PICTURES, replace(PICTURES[0], index=4, seed=4)], stage="draft")
    assert len(json.loads((tmp_path / "out" / "contact_sheet.json").read_text())) == 5, "more drafts to choose from"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": "sketch"}, "unknown stage 'sketch': use one of all, draft, refine, decode"),
        ({"pick": [4]}, "there is no picture 4; they are numbered from 0 to 3"),
        ({"pick": []}, "no picture is named"),
        ({"pick": "3;7"}, "pick is '3;7', but it must be a list of numbers"),
        ({"shard": "3/2"}, "shard is '3/2'"),
        ({"shard": "0/2"}, "such as shard=1/4"),
        ({"format": "gif"}, "unknown format 'gif'"),
    ],
)
def test_what_cannot_be_is_refused(make, options, message):
    with pytest.raises(UserError, match=message):
        make("out", PICTURES, **options)


def test_shards_are_equal_parts_of_a_list(make, tmp_path, whole):
    first = make("out", PICTURES, shard="1/2")
    assert not (tmp_path / "out" / "pictures.jsonl").exists(), "the run is not finished"
    second = make("out", PICTURES, shard="2/2")
    assert [file.name[:5] for file in (*first, *second)] == ["00000", "00002", "00001", "00003"]
    assert torch.equal(load_picture(second[1]), whole[3])
    assert len((tmp_path / "out" / "pictures.jsonl").read_text().splitlines()) == 4
    assert make("out", PICTURES, shard="2/2") == second, "a late part finds its work done"
    for shard in ("1/2", "2/2"):
        again = make("out", PICTURES, shard=shard, overwrite=True)
    assert again == second
    assert (tmp_path / "out" / "pictures.jsonl").is_file(), "the second part leaves the first one's pictures"


@pytest.mark.parametrize(("sampling", "warns"), [(SAMPLING, True), (replace(SAMPLING, start=0.7), False)])
def test_a_draft_that_nothing_reads_is_warned_of(make, caplog, sampling, warns):
    make("out", sampling=sampling)
    assert ("no LoRA that teaches" in caplog.text) == warns


def test_overwriting_removes_nothing_that_is_needed(make, tmp_path):
    kept = make("out", PICTURES[:2])
    photo = DraftPhoto(kept[1])
    for options, message in (
        ({"pick": [1]}, r"removes all pictures of .*out, but pick=\[1\] makes only some"),
        ({"photo": photo}, "would remove the draft .*00001"),
        ({"memory": Memory(limit_gb=0.001)}, "needs"),
    ):
        with pytest.raises(UserError, match=message):
            make("out", PICTURES[:2], overwrite=True, **options)
        assert all(file.is_file() for file in (*kept, tmp_path / "out" / "pictures.jsonl"))


def test_drafts_of_another_prompt_are_not_shown_as_new_ones(make):
    make("drafts", PICTURES[:1], stage="draft")
    other = replace(PICTURES[0], prompt="another")
    with pytest.raises(UserError, match=r"another prompt.*overwrite=true"):
        make("drafts", [other], stage="draft")


def test_a_chosen_number_is_that_of_the_contact_sheet(make, tmp_path):
    """Another seed made a new draft that nobody had seen."""
    make("drafts", PICTURES[:3], stage="draft")
    others = [replace(picture, seed=picture.seed + 9) for picture in PICTURES]
    before = sorted(tmp_path.rglob("*"))
    message = (
        r"picture 2 on .*contact_sheet.png has seed 2 and prompt 'a large red circle on sand', but this command asks "
        r"for seed 11 and .*leave out what changes its numbers \(seed=.*stage=draft first, or another folder"
    )
    with Stop(BLOCK, 1, AssertionError("a step is made")), pytest.raises(UserError, match=message):
        make("drafts", others, stage="refine", pick=2)
    assert sorted(tmp_path.rglob("*")) == before
    (unseen,) = make("drafts", others, stage="refine", pick=3)
    assert unseen.name == "00003_seed12.png", "a number that the sheet lacks is a new draft's"
    make("drafts", others, stage="draft")
    (seen,) = make("drafts", others, stage="refine", pick=2)
    assert seen.name == "00002_seed11.png"
    for broken in ("[", "null", '[{"index": 0}]'):
        (tmp_path / "drafts" / "contact_sheet.json").write_text(broken)
        with pytest.raises(UserError, match=r"contact_sheet.json cannot be read .* give stage=draft"):
            make("drafts", others, stage="refine", pick=1)


def test_a_contact_sheet_goes_with_its_drafts(make, tmp_path):
    make("drafts", PICTURES[:1], stage="draft")
    other = replace(PICTURES[0], seed=9)
    make("drafts", [other], overwrite=True)
    assert not list(tmp_path.glob("drafts/contact_sheet*"))
    (file,) = make("drafts", [other], stage="refine")
    assert file.name == "00000_seed9.png"


@pytest.mark.parametrize(
    ("picture", "sampling"),
    [
        (replace(PICTURES[0], prompt="another"), SAMPLING),
        (replace(PICTURES[0], negative_prompt="blur"), SAMPLING),
        (replace(PICTURES[0], width=128), SAMPLING),
        (PICTURES[0], replace(SAMPLING, draft_steps=3)),
    ],
)
def test_a_chosen_draft_of_other_settings_is_refused(make, picture, sampling):
    make("drafts", PICTURES[:1], stage="draft")
    with pytest.raises(UserError, match=r"draft.safetensors are steps of other settings or another prompt"):
        make("drafts", [picture], sampling, stage="refine", pick=0)


def hold_claim(folder: Path, taken, wait) -> None:
    with Claims(folder) as claims:
        taken.put(claims.take(1))
        wait.wait()


def test_a_claim_is_one_processes_and_dies_with_it(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    taken = context.SimpleQueue()
    other = context.Process(target=hold_claim, args=(tmp_path, taken, context.Event()))
    other.start()
    assert taken.get()
    with Claims(tmp_path) as claims:
        assert claims.take(0)
        assert not claims.take(1)
        other.kill()
        other.join()
        assert claims.take(1), "a killed process keeps nothing"
