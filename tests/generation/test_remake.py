"""Windows of a finished picture made anew, as the command makes them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import run as run_command
from PIL import Image
from small_runs import LARGE, METHOD, SAMPLING_OF_LARGE, STAR, changed

from scale_dit.data import decode
from scale_dit.errors import UserError
from scale_dit.generation import Files, Job, Remake
from scale_dit.generation.remake import FinishedPicture
from scale_dit.picture_files import load_picture, read_provenance, save_picture
from scale_dit.pipeline import ScaleDiTPipeline
from scale_dit.planning.memory import Memory
from scale_dit.resuming import remake_arguments

BOX = [[64, 64, 65, 65]]


def window(small_settings) -> int:
    """Side of a window in px."""
    return METHOD.plan(small_settings, 256, 512).layout.window * small_settings.token_size


def test_only_the_window_that_a_box_touches_changes(make_large, finished, small_settings):
    side = window(small_settings)
    where = np.zeros((256, 512), dtype=bool)
    where[64 // side * side :, 64 // side * side :][:side, :side] = True
    assert side < 256
    file = make_large("one", remake=Remake(FinishedPicture(finished), BOX))
    difference = changed(finished, file)
    assert not difference[~where].any()
    assert difference[where].mean() > 0.5
    assert read_provenance(file)["settings"]["remake"]["kept"] == {"latents": True, "draft": True}
    mask = finished.with_name("mask.png")
    Image.fromarray(np.uint8(255 * where)).save(mask)
    by_mask = make_large("mask", remake=Remake(FinishedPicture(finished), mask=mask))
    assert torch.equal(load_picture(by_mask), load_picture(file))


def test_a_remade_picture_is_remade_in_turn(make_large, finished):
    first = make_large("first", remake=Remake(FinishedPicture(finished), BOX))
    second = make_large("second", remake=Remake(FinishedPicture(first), [[448, 192, 512, 256]]))
    assert read_provenance(second)["settings"]["remake"]["kept"] == {"latents": True, "draft": True}
    difference = changed(first, second)
    assert difference.any()
    assert not difference[:128, :256].any()


def test_what_is_put_in_is_what_decoding_the_whole_would_show(make_large, finished, small_settings):
    file = make_large("near", remake=Remake(FinishedPicture(finished), BOX))
    latents = FinishedPicture(file).latents(read_provenance(file)["settings"])
    pipeline = ScaleDiTPipeline.from_pretrained(small_settings.path, settings=small_settings)
    whole = pipeline.decode(latents)[0]
    side, blended = window(small_settings), small_settings.token_size
    top = 64 // side * side + blended
    inside = slice(top, top + side - 2 * blended)
    shown = (whole * 255).round().to(torch.uint8)
    assert torch.equal(load_picture(file)[:, inside, inside], shown[:, inside, inside])


def test_every_remake_draws_noise_of_its_own(make_large, finished):
    remake = Remake(FinishedPicture(finished), BOX)
    once = make_large("once", remake=remake)
    twice = make_large("twice", remake=Remake(FinishedPicture(once), BOX))
    other = make_large("other", replace(LARGE, seed=1), remake=remake)
    inside = slice(80, 112)
    assert changed(once, twice)[inside, inside].mean() > 0.5
    assert changed(once, other)[inside, inside].mean() > 0.5


def test_latents_are_of_the_file_as_it_is_and_of_the_same_base(make_large):
    made = make_large("painted")
    settings = read_provenance(made)["settings"]
    assert FinishedPicture(made).latents(settings) is not None
    assert FinishedPicture(made).draft(settings) is not None
    assert FinishedPicture(made).latents(settings | {"weights": "of another base"}) is None
    copy = made.with_name("mine.png")
    copy.write_bytes(made.read_bytes())
    assert FinishedPicture(copy).latents(settings) is not None, "under whatever name"
    save_picture(1 - load_picture(made) / 255, copy, read_provenance(made))
    assert FinishedPicture(copy).latents(settings) is None
    save_picture(1 - load_picture(made) / 255, made, read_provenance(made))
    assert FinishedPicture(made).latents(settings) is None
    assert FinishedPicture(made).draft(settings) is None


def test_the_source_and_its_run_are_left_alone(make_large, finished):
    before = {file: file.read_bytes() for file in finished.parent.rglob("*") if file.is_file()}
    source = FinishedPicture(finished)
    wrong = {
        "is the folder of": {"folder": "finished", "remake": Remake(source, BOX)},
        "inside the picture": {"folder": "finished2", "remake": Remake(source, [[0, 0, 9999, 9]])},
        "quality=80 would change": {"folder": "lossy", "remake": Remake(source, BOX), "files": Files("webp", 80)},
        "leave out height=128": {"folder": "x", "remake": Remake(source, BOX), "picture": replace(LARGE, height=128)},
        "but stage=decode": {"folder": "drafts", "remake": Remake(source, BOX), "job": Job(stage="draft")},
    }  # fmt: skip
    for message, options in wrong.items():
        with pytest.raises(UserError, match=message):
            make_large(**options, overwrite=True)
    assert {file: file.read_bytes() for file in finished.parent.rglob("*") if file.is_file()} == before
    assert not (finished.parent.parent / "finished2").exists()


@pytest.mark.slow
def test_the_command_takes_over_what_the_picture_was_made_with(finished, tmp_path):
    def run(*arguments: str) -> Path:
        ran = run_command("generate.py", *arguments, cwd=tmp_path)
        assert ran.returncode == 0, ran.stderr
        return tmp_path / ran.stdout.splitlines()[-1]

    common = (
        "lora.path=none",
        "steps=2",
        "draft_steps=2",
        "height=128",
        "width=256",
        "keep_latents=true",
        "negative_prompt=blur",
    )
    base = read_provenance(finished)["settings"]["base"]["path"]
    first = run(f"base.path={base}", "prompt=a star", *common, "output=one")
    second = run(f"remake={first}", "boxes=[[0,0,8,8]]", "output=two")
    Image.new("L", (256, 128), 255).save(tmp_path / "mask.png")
    third = run(f"remake={second}", "mask=mask.png", "negative_prompt=fog", "output=three")
    decoded = run(f"resume={second.parent}", "stage=decode", "format=tiff")
    assert torch.equal(load_picture(decoded), load_picture(second))
    assert [read_provenance(file)["negative_prompt"] for file in (first, second, third)] == ["blur", "blur", "fog"]
    assert read_provenance(third)["settings"]["sampling"]["steps"] == 2
    assert read_provenance(third)["settings"]["remake"]["kept"] == {"latents": True, "draft": True}


def test_a_picture_by_somebody_else_is_its_own_draft(make_large, small_settings, tmp_path):
    picture = torch.rand(3, 256, 512, generator=torch.Generator().manual_seed(0))
    save_picture(picture, tmp_path / "theirs.png")
    theirs = FinishedPicture(tmp_path / "theirs.png")
    assert theirs.picture is None
    with pytest.raises(UserError, match=r"theirs.png does not say what it shows: say it with prompt="):
        Remake(theirs, BOX).prompt()
    file = make_large("theirs", sampling=replace(SAMPLING_OF_LARGE, start=0.5), remake=Remake(theirs, BOX))
    difference = changed(tmp_path / "theirs.png", file)
    assert difference.any()
    assert not difference[:, 256:].any()
    assert not difference[128:].any()


def test_an_interrupted_remake_goes_on_bit_by_bit(make_large, finished, monkeypatch):
    remake = Remake(FinishedPicture(finished), BOX)
    undisturbed = make_large("undisturbed", remake=remake)
    from scale_dit.generation import maker

    saved, keep = [], maker.LatentsKeeper.after_step

    def stop(self, index, timestep, latents):
        keep(self, index, timestep, latents)
        saved.append(index)
        if index == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(maker.LatentsKeeper, "after_step", stop)
        with pytest.raises(SystemExit):
            make_large("interrupted", remake=remake)
    steps = []
    with monkeypatch.context() as patch:
        patch.setattr(maker.LatentsKeeper, "after_step", lambda self, *step: steps.append(step[0]) or keep(self, *step))
        resumed = make_large("interrupted", remake=remake, job=Job(resume=True))
    assert (saved, steps) == ([0, 1], [2])
    assert torch.equal(load_picture(resumed), load_picture(undisturbed))


@pytest.mark.parametrize("keeps", [True, False], ids=["kept", "somebody else's"])
def test_decoding_alone_makes_the_same_picture(make_large, finished, tmp_path, monkeypatch, keeps):
    """Also where the source has no latents, so that it is encoded as its own draft."""
    if not keeps:
        save_picture(load_picture(finished), tmp_path / "theirs.png")
    remake = Remake(FinishedPicture(finished if keeps else tmp_path / "theirs.png"), BOX)
    whole, name = make_large(f"whole {keeps}", remake=remake), f"decoded {keeps}"
    with monkeypatch.context() as patch:
        patch.setattr(ScaleDiTPipeline, "decode_bands", lambda *_: [][0])
        with pytest.raises(IndexError):
            make_large(name, remake=remake)
    job, refinement = Job(stage="decode", resume=True), []
    monkeypatch.setattr(ScaleDiTPipeline, "remake", lambda *_, **__: refinement.append(1))
    decoded = make_large(name, remake=remake, job=job)
    assert torch.equal(load_picture(decoded), load_picture(whole))
    assert read_provenance(decoded)["fingerprint"] == read_provenance(whole)["fingerprint"]
    again = make_large(name, remake=remake, job=job, files=Files("tiff", keep_latents=True))
    assert torch.equal(load_picture(again), load_picture(whole))
    assert not refinement
    turn = FinishedPicture(again).latents(read_provenance(whole)["settings"])
    assert torch.equal(turn, FinishedPicture(whole).latents(read_provenance(whole)["settings"]))
    assert FinishedPicture(again).draft(read_provenance(whole)["settings"]) is not None
    assert FinishedPicture(decoded).latents(read_provenance(whole)["settings"]) is not None, "one format beside another"


def test_the_options_of_the_run_are_taken_over_but_not_what_it_made(tmp_path):
    record = {"overrides": ["base=tiny", "steps=3", "start=0.9", "prompt='a star'", "seed=4", f"output={tmp_path}"]}
    (tmp_path / "run.json").write_text(json.dumps(record))
    record["overrides"] += ["boxes=[[9,9,10,10]]", "quality=80"]
    (tmp_path / "run.json").write_text(json.dumps(record))
    given = [f"remake='{tmp_path}/00000_seed4.png'", "mask=mask.png", "steps=5"]
    assert remake_arguments(given) == ["base=tiny", "steps=5", *given[:2]]
    assert remake_arguments(["remake=elsewhere.png"]) == ["remake=elsewhere.png"]


def test_what_cannot_be_made_anew_is_said(finished, tmp_path, small_settings):
    source = FinishedPicture(finished)
    with pytest.raises(UserError, match="needs to know where: give boxes="):
        Remake(source)
    with pytest.raises(UserError, match="give it as remake="):
        Remake.of(None, BOX, None)
    with pytest.raises(UserError, match=r"boxes is 'left': give a list"):
        Remake.of(str(finished), "left", None)
    with pytest.raises(UserError, match=r"the box \[0, 0, 1\] is not left, top, right, bottom"):
        Remake(source, [[0, 0, 1]])
    with pytest.raises(UserError, match=r"keeps the picture's size, 512 x 256 px: leave out height=128"):
        Remake(source, BOX).size(128, None, 16)
    with pytest.raises(UserError, match="512 x 256 px, no multiples of 48: crop or resize it"):
        Remake(source, BOX).size(None, None, 48)
    layout = METHOD.plan(small_settings, 256, 512).layout
    with pytest.raises(UserError, match="inside the picture of 512 x 256"):
        Remake(source, [[0, 0, 513, 8]]).chosen(layout, 16)
    (tmp_path / "mask.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"the mask .*mask.png cannot be used"):
        Remake(source, mask=tmp_path / "mask.png")
    save_picture(torch.ones(3, 16, 16), tmp_path / "small.png")
    with pytest.raises(UserError, match="the mask has 16 x 16 px, which is not the picture's size"):
        Remake(source, mask=tmp_path / "small.png").chosen(layout, 16)


def test_sources_and_masks_above_pillows_limit_are_taken_and_those_above_ours_refused(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    mask = tmp_path / "mask.tif"
    Image.new("1", (512, 256), 1).save(mask)
    source = FinishedPicture(finished)
    assert source.pixels().shape == (3, 256, 512)
    Remake(source, mask=mask)
    monkeypatch.setattr(decode, "LARGEST", 100)
    with pytest.raises(UserError, match=r"the mask .*mask.tif .*512 x 256 px.*: reduce or crop it"):
        Remake(source, mask=mask)
    with pytest.raises(UserError, match=r"the picture .*.png .*512 x 256 px.*: reduce or crop it"):
        FinishedPicture(finished)
    assert Image.MAX_IMAGE_PIXELS == 100


@pytest.mark.parametrize("kind", ["png16", "tiff16"])
def test_a_picture_of_16_bits_is_refused(make_large, kind):
    file = make_large(kind, files=Files(format=kind))
    with pytest.raises(UserError, match="has 16 bits a value"):
        FinishedPicture(file)


@pytest.mark.gpu
@pytest.mark.parametrize("offload", ["none", "model", "group"])
def test_on_a_gpu_whatever_is_offloaded(make_large, small_settings, offload):
    options = {
        "device": "cuda", "memory": Memory(offload=offload), "sampling": replace(SAMPLING_OF_LARGE, wrap="both"),
        "picture": replace(LARGE, window_prompts=(STAR,)),
    }  # fmt: skip
    before = make_large(f"before {offload}", **options)
    difference = changed(before, make_large(f"after {offload}", remake=Remake(FinishedPicture(before), BOX), **options))
    assert difference.any()
    assert not difference[:, 64 + window(small_settings) :].any()
