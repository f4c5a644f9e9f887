"""The time left: from what each stage took so far, also before a stage was seen."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from scale_dit.generation.progress import Estimate, GenerationProgress

TWO_PICTURES = [{"draft": 10.0, "refine": 100.0, "decode": 20.0}] * 2


def test_nothing_is_known_before_the_first_step():
    assert Estimate(TWO_PICTURES).left() is None


def test_unseen_stages_go_at_the_pace_of_the_seen():
    estimate = Estimate(TWO_PICTURES)
    estimate.add("draft", 5.0, 1.0)
    assert estimate.left() == pytest.approx((260 - 5) / 5)


def test_seen_stages_go_at_their_own_pace():
    estimate = Estimate(TWO_PICTURES)
    estimate.add("draft", 10.0, 1.0)
    estimate.add("refine", 100.0, 50.0)
    estimate.add("decode", 20.0, 4.0)
    assert estimate.left() == pytest.approx(1.0 + 50.0 + 4.0)
    for stage, work in TWO_PICTURES[1].items():
        estimate.add(stage, work, 1.0)
    assert estimate.left() == 0


def test_the_bar_names_picture_and_stage_and_ends_at_its_end():
    shown = io.StringIO()
    with GenerationProgress(TWO_PICTURES, Console(file=shown, force_terminal=True, width=120)) as progress:
        for _ in TWO_PICTURES:
            progress.begin()
            for stage in ("draft", "refine"):
                for step in range(4):
                    progress.step(stage, step + 1, 4)
                    progress.bar.refresh()
            progress.end()
        assert progress.bar.finished
    assert "picture 2/2: refine 3/4" in shown.getvalue()
    assert "0:00:00 left" in shown.getvalue()
