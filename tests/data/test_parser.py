"""The parser finds what the renderer drew, and does not flatter fragments and mosaics."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import ndimage

from scale_dit.data.parser import FoundObject, SceneScore, parse, score, summarise
from scale_dit.data.scenes import COLOURS, SHAPES, Scene, SceneObject, render, sample_scene
from scale_dit.errors import UserError


def whole_scenes(count):
    return [sample_scene(seed, "test", zoom=1.0) for seed in range(count)]


def accuracies(scenes, side, change):
    return summarise([score(scene, parse(change(render([scene], side, side)[0]))) for scene in scenes])


def blurred(picture, sigma):
    return torch.from_numpy(ndimage.gaussian_filter(picture.numpy(), (0, sigma, sigma)))


def noisy(picture, sigma):
    return picture + sigma * torch.randn(picture.shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("side", "first", "count"),
    [(256, 10, 10), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((256, 40, 200), (1024, 10, 25)))],
)
def test_clean_renders(side, first, count):
    """The first ones are right in all but shape, hundreds nearly so."""
    scenes = whole_scenes(count)
    scores = [score(scene, parse(render([scene], side, side)[0])) for scene in scenes]
    result = summarise(scores[:first])
    assert all(result[name] == 1 for name in ("count_accuracy", "colour_accuracy", "place_accuracy"))
    assert result["relation_accuracy"] == 1
    assert result["shape_accuracy"] > 0.97
    result = summarise(scores)
    assert result["count_accuracy"] >= 0.99
    assert result["colour_accuracy"] >= 0.99
    assert result["shape_accuracy"] >= 0.98


def test_moderate_blur_and_noise():
    scenes = whole_scenes(15)
    assert accuracies(scenes, 256, lambda picture: blurred(picture, 2))["colour_accuracy"] >= 0.9
    assert accuracies(scenes, 256, lambda picture: noisy(picture, 0.1))["colour_accuracy"] >= 0.9


@pytest.mark.parametrize("shape", list(SHAPES))
def test_every_shape_at_any_angle_and_resolution(shape):
    for angle, side, colour in zip((0.0, 0.9, 2.0, -2.6), (256, 320, 512, 200), COLOURS, strict=False):
        item = SceneObject(shape, colour, "checkered", 0.4, (0.4, 0.55), angle)
        (found,) = parse(render([Scene((item,), "wood", 1.0, (0.5, 0.5), 1.0, 5)], side, side)[0])
        assert (found.shape, found.colour) == (shape, colour)
        assert math.dist(found.centre, item.centre) < 0.02
        assert found.size == pytest.approx(item.size, abs=0.03)


def test_wide_pictures():
    scene = sample_scene(8, "test", zoom=1.0, aspect=2.0)
    result = score(scene, parse(render([scene], 256, 512)[0]))
    assert result.count_correct
    assert result.colours_correct
    assert result.place_accuracy == 1


def test_an_empty_ground_holds_nothing():
    assert parse(render([Scene((), "brick", 1.0, (0.5, 0.5), 1.0, 9)], 256, 256)[0]) == []
    assert parse(torch.full((3, 64, 64), 0.5)) == []


def test_a_mosaic_of_colours_is_many_objects():
    """Windows without guidance invent their own colours; the parser must not smooth that away."""
    tones = torch.tensor([tones[0] for tones in COLOURS.values()])
    cells = torch.randint(0, len(tones), (8, 8), generator=torch.Generator().manual_seed(0))
    mosaic = tones[cells].permute(2, 0, 1).repeat_interleave(32, 1).repeat_interleave(32, 2)
    assert len(parse(mosaic)) > 20


def test_fragments_and_copies_make_the_count_wrong():
    item = SceneObject("circle", "green", "plain", 0.5, (0.5, 0.5), 0.0)
    scene = Scene((item,), "stone", 1.0, (0.5, 0.5), 1.0, 2)
    picture = render([scene], 256, 256)[0]
    assert score(scene, parse(picture)).count_correct
    cut = picture.clone()
    cut[:, :, 118:138] = 0.5
    assert not score(scene, parse(cut)).count_correct
    copies = torch.nn.functional.avg_pool2d(picture, 2).repeat(1, 2, 2)
    assert len(parse(copies)) == 4


def test_a_rim_of_similar_hue_is_no_object_but_a_touching_object_is():
    orange, yellow = (torch.tensor(COLOURS[name][0])[:, None, None] for name in ("orange", "yellow"))
    picture = torch.full((3, 256, 256), 0.5)
    picture[:, 60:160, 60:160] = orange
    picture[:, 60:160, 160:170] = yellow
    assert [item.colour for item in parse(picture)] == ["orange"]
    picture[:, 60:160, 160:240] = yellow
    assert {item.colour for item in parse(picture)} == {"orange", "yellow"}


@pytest.mark.parametrize("image", [torch.zeros(1, 8, 8), torch.zeros(1, 3, 8, 8), torch.full((3, 8, 8), math.nan)])
def test_pictures_that_cannot_be_parsed(image):
    with pytest.raises(UserError):
        parse(image)


def two_objects():
    red = SceneObject("circle", "red", "plain", 0.2, (0.2, 0.5), 0.0)
    blue = SceneObject("star", "blue", "plain", 0.2, (0.8, 0.5), 0.0)
    return Scene((red, blue), "sand", 1.0, (0.5, 0.5), 1.0, 0)


def found(colour, shape, x, y):
    return FoundObject(colour, shape, (x, y), 0.2, 1.0)


@pytest.mark.parametrize(
    ("objects", "expected"),
    [
        (
            [found("red", "circle", 0.2, 0.5), found("blue", "star", 0.8, 0.5)],
            SceneScore(2, 2, True, True, 2, 1.0, 1.0, 1.0),
        ),
        # Swapped places: everything is there, nothing is where it should be.
        (
            [found("red", "circle", 0.8, 0.5), found("blue", "star", 0.2, 0.5)],
            SceneScore(2, 2, True, True, 2, 0.0, 1.0, 0.0),
        ),
        (
            [found("red", "square", 0.25, 0.5), found("green", "star", 0.8, 0.5)],
            SceneScore(2, 2, True, False, 1, 0.5, 0.0, 0.0),
        ),
        # A second red circle: the nearer one is the match.
        (
            [found("red", "square", 0.9, 0.9), found("red", "circle", 0.2, 0.5), found("blue", "star", 0.8, 0.5)],
            SceneScore(2, 3, False, False, 2, 1.0, 1.0, 1.0),
        ),
        ([], SceneScore(2, 0, False, False, 0, 0.0, 0.0, 0.0)),
    ],
)
def test_scores_by_hand(objects, expected):
    assert score(two_objects(), objects) == expected


def test_summary_is_the_mean_and_needs_a_score():
    right = SceneScore(1, 1, True, True, 1, 1.0, 1.0, None)
    wrong = SceneScore(2, 3, False, True, 1, 0.5, 0.0, 1.0)
    result = summarise([right, wrong])
    assert result["count_accuracy"] == 0.5
    assert result["colour_accuracy"] == 1.0
    assert result["recall"] == 0.75
    assert result["relation_accuracy"] == 1.0
    assert result["n"] == 2
    assert math.isnan(summarise([right])["relation_accuracy"])
    with pytest.raises(UserError, match="at least one"):
        summarise([])
