"""What is to be made is known, and refused where it cannot be, before any weight is loaded."""

from __future__ import annotations

import logging
import re
from dataclasses import replace

import pytest

from scale_dit.errors import UserError
from scale_dit.generation import Prompt, Sampling, collect_pictures, collect_prompts
from scale_dit.generation.pictures import warn_of_unread_negatives
from scale_dit.method import Method
from scale_dit.models.settings import BaseSettings

BASE = BaseSettings(name="small", cell=2, window=4, native=256, text_length=24, shift=1.0, steps=2)


def pictures(prompts, sampling=Sampling(), method=Method(), **options):  # noqa: B008
    return collect_pictures(prompts, BASE, method, sampling, **options)


def test_seeds_are_consecutive_and_a_line_may_have_its_own():
    made = pictures([Prompt("a"), Prompt("b", seed=100, negative_prompt="")], n=2, seed=7, negative_prompt="blur")
    assert [(p.index, p.prompt, p.seed, p.negative_prompt) for p in made] == [
        (0, "a", 7, "blur"),
        (1, "a", 8, "blur"),
        (2, "b", 100, ""),
        (3, "b", 101, ""),
    ]


def test_sizes_default_to_scale_times_native():
    (default,) = pictures([Prompt("a")])
    (twice,) = pictures([Prompt("a")], Sampling(scale=2))
    (own,) = pictures([Prompt("a", height=512)], width=768)
    assert (default.height, default.width) == (1024, 1024)
    assert (twice.height, twice.width) == (512, 512)
    assert (own.height, own.width) == (512, 768)


def test_scale_comes_from_the_size():
    assert Sampling().scale_for(BASE, 512, 2048) == 4
    assert Sampling().scale_for(BASE, 128, 128) == 1
    assert Sampling(scale=3).scale_for(BASE, 512, 2048) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 1000}, "use 992 or 1008"),
        ({"width": 0}, "Width 0 px"),
        ({"height": -16}, "Height -16 px"),
        ({"n": 0}, "n is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": "one"}, "seed is 'one', which is no whole number"),
        ({"height": "high"}, "height is 'high', which is no whole number"),
        ({"seed": 2**63}, "from 0 to 9223372036854775807"),
        ({"sampling": Sampling(scale=0.5)}, "Scale is 0.5"),
        ({"method": Method(window=3)}, "multiple of the cell"),
        ({"method": Method(window=256)}, "larger than the picture's grid"),
        ({"method": Method(window=0)}, "Window 0"),
        ({"method": Method(order="spiral")}, "hilbert, raster, window"),
        ({"method": Method(anchors="left")}, "left"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        pictures([Prompt("a")], **options)


def test_a_line_whose_size_cannot_be_costs_that_line(caplog):
    lines = [Prompt("a", height=100, source="p.csv, line 2"), Prompt("b")]
    with caplog.at_level(logging.WARNING):
        made = pictures(lines)
    assert [picture.prompt for picture in made] == ["b"]
    assert "p.csv, line 2" in caplog.text
    assert "use 96 or 112" in caplog.text
    with pytest.raises(UserError, match="no line"):
        pictures(lines[:1])


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (Sampling(steps=0), "steps is 0"),
        (Sampling(draft_steps=-1), "steps is -1"),
        (Sampling(start=0), "start is 0"),
        (Sampling(start=1.5), "start is 1.5"),
        (Sampling(guidance_scale=float("nan")), "guidance_scale is nan"),
        (Sampling(decode_tile=8), "decode_tile is 8 px"),
    ],
)
def test_sampling_that_cannot_be_is_refused(sampling, message):
    with pytest.raises(UserError, match=message):
        sampling.check(BASE)


@pytest.mark.parametrize("prompt", [None, [], "", "  ", ["a", ""]])
def test_empty_prompts_are_refused(prompt):
    with pytest.raises(UserError, match="empty"):
        collect_prompts(prompt, None)


def test_prompts_come_from_one_place(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("a\n")
    assert [prompt.text for prompt in collect_prompts(None, path)] == ["a"]
    assert [prompt.text for prompt in collect_prompts(["b", "c"], None)] == ["b", "c"]
    with pytest.raises(UserError, match="both"):
        collect_prompts("b", path)


def test_broken_lines_are_named_in_warnings(tmp_path, caplog):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "good", "style": "oil"}\n{]\n')
    with caplog.at_level(logging.WARNING):
        collect_prompts(None, path)
    assert "p.jsonl, line 2" in caplog.text
    assert "style" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": "many"}, "steps is 'many', which is no whole number"),
        ({"steps": 2.5}, "steps is 2.5, which is no whole number"),
        ({"start": "late"}, "start is 'late', which is no number"),
        ({"guidance_scale": True}, "guidance_scale is True, which is no number"),
    ],
)
def test_what_is_no_number_is_named(options, message):
    with pytest.raises(UserError, match=message):
        Sampling(**options)


GUIDED = replace(BASE, distilled=False, guidance_scale=4.0, refine_guidance_scale=1.0)


@pytest.mark.parametrize(
    ("base", "sampling", "drafting", "message"),
    [
        (BASE, Sampling(), True, "base small is distilled.*base=klein_base_4b"),
        (BASE, Sampling(guidance_scale=7), True, "base small is distilled"),
        (GUIDED, Sampling(), True, None),  # the draft reads it
        (GUIDED, Sampling(), False, "give guidance_scale=4$"),
        (GUIDED, Sampling(guidance_scale=2), False, None),
        (GUIDED, Sampling(draft_guidance_scale=1), True, "give guidance_scale=4$"),
        (replace(GUIDED, guidance_scale=1.0), Sampling(), True, "give guidance_scale=4$"),
    ],
)
def test_a_negative_prompt_that_nothing_reads_is_said_once(base, sampling, drafting, message, caplog):
    prompts = [Prompt("a"), Prompt("b", negative_prompt="blur"), Prompt("c", negative_prompt="noise")]
    made = collect_pictures(prompts, base, Method(), sampling)
    with caplog.at_level(logging.WARNING):
        warn_of_unread_negatives(made[:1], base, Method(), sampling, drafting=drafting)
        assert not caplog.records
        warn_of_unread_negatives(made, base, Method(), sampling, drafting=drafting)
    assert len(caplog.records) == (0 if message is None else 1)
    if message is not None:
        assert re.search(f"negative prompt of 2 of 3 pictures.*{message}", caplog.text.strip())
