"""Prompts for windows, and joined edges, as the command makes them."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest
import torch
from small_runs import LARGE, METHOD, SAMPLING_OF_LARGE, STAR, changed

from scale_dit.errors import UserError
from scale_dit.generation import collect_pictures, generate, read_prompts
from scale_dit.generation.remake import FinishedPicture
from scale_dit.generation.window_prompts import read_window_prompts
from scale_dit.local_control import WindowPrompt
from scale_dit.picture_files import load_picture, read_provenance
from scale_dit.pipeline import ScaleDiTPipeline
from scale_dit.planning.memory import Memory


def test_a_window_shows_its_own_prompt(make_large, finished):
    file = make_large("star", replace(LARGE, window_prompts=(STAR,)))
    assert changed(finished, file).any()
    assert read_provenance(file)["window_prompts"] == [{"box": [0, 0, 64, 64], "prompt": STAR.prompt}]
    assert FinishedPicture(file).picture.window_prompts == (STAR,)
    listed = read_prompts(file.parent / "pictures.jsonl")
    assert not listed.unknown_fields
    assert listed.prompts[0].window_prompts == (STAR,)


def test_window_prompts_are_encoded_before_text_encoders_are_dropped(make_large):
    memory = Memory(offload="text", feed_forward_tokens=0, keys_values="device")
    here, dropped = (make_large(name, replace(LARGE, window_prompts=(STAR,)), memory=each) for name, each in (
        ("kept", Memory()), ("dropped", memory),
    ))  # fmt: skip
    assert torch.equal(load_picture(here), load_picture(dropped))


def test_prompts_of_windows_are_read_from_files(tmp_path, small_settings, caplog):
    good = [{"box": [0, 0, 64, 64], "prompt": STAR.prompt}]
    lines = [
        {"prompt": "one", "window_prompts": good},
        {"prompt": "two", "window_prompts": [{"box": [0, 0, 64, 64]}]},
        {"prompt": "three", "window_prompts": [{"box": [0, 0, 9999, 64], "prompt": "a star"}]},
        {"prompt": "four"},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    quoted = json.dumps(good).replace('"', '""')
    (tmp_path / "p.csv").write_text(f'prompt,window_prompts\none,"{quoted}"\n')
    assert read_prompts(tmp_path / "p.csv").prompts[0].window_prompts == (STAR,)
    found = read_prompts(tmp_path / "p.jsonl")
    assert found.broken == [
        "p.jsonl, line 2: window_prompts holds {'box': [0, 0, 64, 64]}, which is not a box and a prompt: use "
        '[{"box": [left, top, right, bottom], "prompt": "a blue star"}], the box in px'
    ]
    other = WindowPrompt((0, 0, 16, 16), "grass")
    with caplog.at_level(logging.WARNING):
        pictures = collect_pictures(
            found.prompts, small_settings, METHOD, SAMPLING_OF_LARGE, height=256, width=512, window_prompts=[other]
        )
    assert [(each.prompt, each.window_prompts) for each in pictures] == [("one", (STAR,)), ("four", (other,))]
    assert "p.jsonl, line 3: the box [0, 0, 9999, 64]" in caplog.text


@pytest.mark.parametrize(
    "value", ["[{box: [0, 0", "5", "a star", ["a star"], '[{"box": [0, 0, 1.5, 8], "prompt": "a star"}]']
)
def test_prompts_of_windows_that_are_none_are_named(value):
    with pytest.raises(UserError, match="box"):
        read_window_prompts(value)


def test_joined_edges_are_refused_with_a_decoder_that_has_edges(small_settings, tmp_path):
    with pytest.raises(UserError, match=r"decode mode 'tiled' cannot join edges \(wrap=both\)"):
        generate(
            [LARGE],
            small_settings,
            METHOD,
            replace(SAMPLING_OF_LARGE, wrap="both"),
            tmp_path,
            memory=Memory(decode="tiled"),
        )
    with pytest.raises(UserError, match="unknown wrap 'vertical'"):
        generate([LARGE], small_settings, METHOD, replace(SAMPLING_OF_LARGE, wrap="vertical"), tmp_path)


def test_a_picture_whose_edges_join_is_the_same_from_python(make_large, small_settings):
    file = make_large("joined", sampling=replace(SAMPLING_OF_LARGE, wrap="horizontal"))
    pipeline = ScaleDiTPipeline.from_pretrained(small_settings.path, settings=small_settings)
    pipeline.method = METHOD
    picture = pipeline(
        LARGE.prompt, LARGE.height, LARGE.width, num_inference_steps=3, draft_steps=2, wrap="horizontal",
        generator=torch.Generator().manual_seed(0), output_type="pt",
    ).images[0]  # fmt: skip
    assert torch.equal((picture * 255).round().to(torch.uint8), load_picture(file))
    assert changed(file, make_large("edges")).any()
