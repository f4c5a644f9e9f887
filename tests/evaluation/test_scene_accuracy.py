from __future__ import annotations

import pytest
import torch

from scale_dit.data.scenes import render, sample_scene
from scale_dit.evaluation.metric import Record
from scale_dit.evaluation.scenes_metrics import SceneAccuracy


@pytest.fixture(scope="module")
def world():
    scenes = [sample_scene(seed, "test") for seed in range(24)]
    return scenes, (render(scenes, 256, 256) * 255).round().to(torch.uint8)


def measured(scenes, images, drafts=None):
    metric = SceneAccuracy()
    records = [Record(i, "", i, scene, draft=None if drafts is None else drafts[i]) for i, scene in enumerate(scenes)]
    metric.update("arm", images, [""] * len(scenes), records)
    return metric.compute("arm"), metric.per_picture("arm")


def test_true_renders_are_right_and_grey_pictures_wrong(world):
    scenes, images = world
    right, per_picture = measured(scenes, images)
    for name in ("count", "colour", "place", "relation"):
        assert right[name].value > 0.9, name
        assert right[name].low <= right[name].value <= right[name].high
    assert right["count"].n == 24
    assert len(per_picture["count"]) == 24
    assert right["shape"].value > 0.5
    # Scenes with one object have no relation.
    assert right["relation"].n < 24
    grey, _ = measured(scenes, torch.full_like(images, 128))
    assert grey["colour"].value == 0
    assert grey["objects"].value == 0


def test_pictures_of_other_scenes_are_wrong(world):
    scenes, images = world
    assert measured(scenes, images.roll(1, 0))[0]["colour"].value < 0.3


def test_retention_is_the_count_accuracy_over_that_of_the_drafts(world):
    scenes, images = world
    drafts = torch.nn.functional.avg_pool2d(images.float(), 2).round().to(torch.uint8)
    made = images.clone()
    made[::2] = 128
    figures, _ = measured(scenes, made, drafts)
    expected = figures["count"].value / figures["draft_count"].value
    assert figures["count_retention"].value == pytest.approx(expected)
    assert 0.2 < figures["count_retention"].low < expected < figures["count_retention"].high < 0.8
    assert "count_retention" not in measured(scenes, made)[0]


def test_pictures_without_a_scene_are_skipped(world):
    _, images = world
    assert measured([None] * 2, images[:2]) == ({}, {})
