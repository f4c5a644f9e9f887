"""The runner with simple real arms: the truth, its bicubic reduction brought back, and noise."""

from __future__ import annotations

import csv
import io
import json

import pytest
import torch
from torch.nn.functional import interpolate

from scale_dit.data.captions import caption
from scale_dit.data.scenes import render, sample_scene
from scale_dit.errors import UserError
from scale_dit.evaluation.arms import Arm, ArmOutput
from scale_dit.evaluation.clip import ClipScore
from scale_dit.evaluation.detail import Detail
from scale_dit.evaluation.report import print_results
from scale_dit.evaluation.runner import evaluate
from scale_dit.evaluation.scenes_metrics import SceneAccuracy
from scale_dit.picture_files import load_picture

SIDE, DRAFT = 256, 64
SCENES = [sample_scene(seed, "test") for seed in range(6)]
PROMPTS = [caption(scene, seed) for seed, scene in enumerate(SCENES)]
SEEDS = [100 + i for i in range(6)]


def truth(prompts, seeds):
    pictures = render([SCENES[seed - 100] for seed in seeds], SIDE, SIDE)
    return ArmOutput(pictures, {"refine": 2.0 * len(prompts)}, {"refine": 2**30})


def bicubic(prompts, seeds):
    draft = render([SCENES[seed - 100] for seed in seeds], DRAFT, DRAFT)
    return ArmOutput(interpolate(draft, size=(SIDE, SIDE), mode="bicubic").clamp(0, 1), drafts=draft)


def noise(prompts, seeds):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return ArmOutput(torch.stack([torch.rand(3, SIDE, SIDE, generator=generator) for generator in generators]))


def metrics():
    return {"scenes": SceneAccuracy(), "detail": Detail(SIDE / DRAFT), "clip_score": ClipScore()}


def run(folder, arms=None, **options):
    arms = arms or {"truth_again": truth, "bicubic": bicubic, "noise": noise}
    options = {"scenes": SCENES, "show": False, "batch_size": 4, **options}
    return evaluate(arms, PROMPTS, SEEDS, metrics(), folder, **options)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run(tmp_path_factory.mktemp("evaluation"), baseline="bicubic")


def test_the_truth_wins(results):
    for metric in ("count", "colour", "detail"):
        values = [results.value(arm, metric) for arm in ("truth_again", "bicubic", "noise")]
        assert values[0] == max(values)
        assert values[2] == min(values)
    assert results.value("truth_again", "detail") == 1.0
    assert results.value("bicubic", "detail") < 0.5


def test_differences_are_paired(results):
    row = results.row("truth_again - bicubic", "detail")
    expected = results.value("truth_again", "detail") - results.value("bicubic", "detail")
    assert row.value == pytest.approx(expected)
    assert 0 < row.low <= row.value <= row.high
    assert row.n == 6


def test_a_metric_that_cannot_run_says_so_and_the_others_still_run(results):
    assert "ViT-B-16.pt" in results.unavailable()["clip_score"]
    assert results.row("noise", "clip_score") is None


def test_costs_are_reported_per_stage(results):
    seconds = results.row("truth_again", "seconds_refine")
    assert (seconds.value, seconds.unit) == (2.0, "s/picture")
    assert results.row("truth_again", "peak_memory_refine").value == 1.0


def test_retention_comes_from_an_arms_own_drafts(results):
    assert results.row("bicubic", "count_retention").n == 6
    assert results.row("noise", "count_retention") is None


def test_files_hold_what_was_measured(results):
    document = json.loads((results.folder / "results.json").read_text())
    assert document["prompts"] == PROMPTS
    assert document["seeds"] == SEEDS
    assert document["machine"]
    with (results.folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(document["rows"]) == len(results.rows)
    (count,) = [row for row in rows if (row["arm"], row["metric"]) == ("bicubic", "count")]
    assert float(count["value"]) == results.value("bicubic", "count")
    names = sorted(path.name for path in (results.folder / "noise").iterdir())
    assert names == [f"{i:05d}_seed{100 + i}.png" for i in range(6)]
    assert load_picture(results.picture_grid).shape[1] > 6 * 320
    assert load_picture(results.folder / "crops.png").shape == load_picture(results.picture_grid).shape


def test_the_table_names_arms_metrics_and_what_is_missing(results):
    from rich.console import Console

    console = Console(record=True, width=200, file=io.StringIO())
    print_results(results, console)
    text = console.export_text()
    for part in ("truth_again", "count_retention", "truth_again - bicubic", "clip_score: not measured", "results.csv"):
        assert part in text


def test_pictures_with_the_same_settings_are_not_made_again(tmp_path):
    calls = []

    def counted(prompts, seeds):
        calls.append(list(seeds))
        return noise(prompts, seeds)

    first = run(tmp_path, {"noise": Arm(counted, {"steps": 4})})
    assert sum(map(len, calls)) == 6
    (tmp_path / "noise" / "00002_seed102.png").unlink()
    broken = tmp_path / "noise" / "00004_seed104.png"
    broken.write_bytes(broken.read_bytes()[:1000])
    calls.clear()
    again = run(tmp_path, {"noise": Arm(counted, {"steps": 4})})
    assert calls == [[102, 104]]
    assert again.value("noise", "detail") == first.value("noise", "detail")
    calls.clear()
    run(tmp_path, {"noise": Arm(counted, {"steps": 5})})
    assert sum(map(len, calls)) == 6
    calls.clear()
    run(tmp_path, {"noise": counted})
    assert sum(map(len, calls)) == 6


def test_an_arm_that_no_longer_makes_drafts_is_not_judged_by_old_ones(tmp_path):
    assert run(tmp_path, {"arm": bicubic}).row("arm", "draft_count").n == 6
    assert run(tmp_path, {"arm": noise}).row("arm", "draft_count") is None


def test_an_interrupted_evaluation_keeps_what_it_made(tmp_path):
    def stops(prompts, seeds):
        if 104 in seeds:
            raise KeyboardInterrupt
        return noise(prompts, seeds)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, {"noise": Arm(stops, {"a": 1})}, batch_size=2)
    made = []

    def goes_on(prompts, seeds):
        made.extend(seeds)
        return noise(prompts, seeds)

    run(tmp_path, {"noise": Arm(goes_on, {"a": 1})}, batch_size=2)
    assert made == [104, 105]


def test_the_summary_goes_to_a_logger(tmp_path):
    received = {}

    def logger(numbers, grid):
        received.update(numbers, grid=grid)

    run(tmp_path, {"noise": noise}, summary=logger)
    assert received["noise/count"] == 0
    assert received["grid"].is_file()


def test_bad_input_is_named_before_anything_is_made(tmp_path):
    def never(prompts, seeds):
        raise AssertionError("no picture may be made")

    def call(arms=None, prompts=PROMPTS, seeds=SEEDS, **options):
        return evaluate(arms or {"a": never}, prompts, seeds, {}, tmp_path, show=False, **options)

    for match, arguments in (
        ("empty", {"prompts": [], "seeds": []}),
        ("own seed", {"seeds": SEEDS[:2]}),
        ("'dense'.*the arms are a", {"baseline": "dense"}),
        ("batch size", {"batch_size": 0}),
        ("'reference'", {"arms": {"reference": never}}),
    ):
        with pytest.raises(UserError, match=match):
            call(**arguments)
    with pytest.raises(UserError, match="asked for 4 pictures"):
        call({"a": lambda prompts, seeds: ArmOutput(torch.rand(1, 3, 8, 8))}, batch_size=4)
