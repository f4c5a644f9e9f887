"""Sampling and visibility of procedural scenes."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scale_dit.data.scene_sampling import GAP, SMALLEST_SIZE
from scale_dit.data.scenes import (
    COLOURS,
    MAXIMUM_ZOOM,
    SPLITS,
    Scene,
    SceneObject,
    render,
    sample_scene,
    visible_objects,
)
from scale_dit.errors import UserError

SEEDS = st.integers(0, 2**62)


@settings(deadline=None, max_examples=60)
@given(SEEDS, st.sampled_from(SPLITS), st.one_of(st.none(), st.floats(1, 8)), st.floats(0.25, 4))
def test_objects_are_apart_and_the_camera_stays_inside_the_world(seed, split, zoom, aspect):
    scene = sample_scene(seed, split, zoom, aspect)
    width, height = scene.extent
    assert width / height == pytest.approx(aspect)
    assert 1 <= len(scene.objects) <= 4
    for item in scene.objects:
        assert SMALLEST_SIZE <= item.size <= 0.6
        assert item.radius < item.centre[0] < width - item.radius
        assert item.radius < item.centre[1] < height - item.radius
    for one, other in itertools.combinations(scene.objects, 2):
        assert math.dist(one.centre, other.centre) >= one.radius + other.radius + GAP - 1e-9
    left, top, view_width, view_height = scene.view
    assert left >= -1e-9
    assert top >= -1e-9
    assert left + view_width <= width + 1e-9
    assert top + view_height <= height + 1e-9


@settings(deadline=None, max_examples=20)
@given(SEEDS)
def test_same_seed_same_scene_and_zoom_leaves_the_world_as_it_is(seed):
    assert sample_scene(seed) == sample_scene(seed)
    near, whole = sample_scene(seed, zoom=4.0), sample_scene(seed, zoom=1.0)
    assert near.objects == whole.objects
    assert (near.ground, near.seed) == (whole.ground, whole.seed)


def test_splits_are_disjoint():
    drawn = {split: {sample_scene(seed, split, 1.0).objects for seed in range(500)} for split in SPLITS}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not drawn[one] & drawn[other]


def test_scales_are_as_varied_as_promised():
    zooms = [sample_scene(seed).zoom for seed in range(4000)]
    close = [zoom for zoom in zooms if zoom > 1]
    assert len(close) / len(zooms) == pytest.approx(0.5, abs=0.03)
    assert max(close) <= MAXIMUM_ZOOM
    for low, high in ((1, 2), (2, 4), (4, 8)):
        assert sum(low < zoom <= high for zoom in close) / len(close) == pytest.approx(1 / 3, abs=0.04)


def test_most_close_ups_show_an_object():
    close = [scene for scene in map(sample_scene, range(1500)) if scene.zoom > 1]
    assert sum(bool(visible_objects(scene)) for scene in close) / len(close) > 0.85


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"split": "exam"}, "train, validation, test"),
        ({"zoom": 0.5}, "0.5"),
        ({"zoom": math.nan}, "nan"),
        ({"aspect": 9.0}, "between 0.25 and 4"),
    ],
)
def test_wrong_arguments_are_named(arguments, says):
    with pytest.raises(UserError, match=says):
        sample_scene(1, **arguments)


@pytest.mark.parametrize("shape", ["circle", "ring", "cross", "triangle", "square", "star"])
def test_visible_share_and_centre_agree_with_the_pixels(shape):
    item = SceneObject(shape, "red", "plain", 0.5, (0.5, 0.5), 0.2)
    for zoom, centre in ((1.0, (0.5, 0.5)), (2.5, (0.35, 0.6)), (4.0, (0.68, 0.5)), (5.0, (0.5, 0.3))):
        scene = Scene((item,), "stone", zoom, centre, 1.0, 3)
        picture = render([scene], 256, 256)[0]
        red = picture[0] - picture[1] > 0.25
        share = float(red.float().mean())
        seen = visible_objects(scene)
        if share < 0.002:
            assert not seen
            continue
        assert seen[0].share == pytest.approx(share, abs=0.01 + 0.06 * share)
        rows, columns = red.nonzero().float().T
        assert seen[0].centre[0] == pytest.approx(float(columns.mean() + 0.5) / 256, abs=0.03)
        assert seen[0].centre[1] == pytest.approx(float(rows.mean() + 0.5) / 256, abs=0.03)
        assert seen[0].size == pytest.approx(0.5 * zoom)


def test_the_hole_of_a_ring_shows_no_object():
    ring = SceneObject("ring", "blue", "plain", 0.6, (0.5, 0.5), 0.0)
    assert visible_objects(Scene((ring,), "sand", 8.0, (0.5, 0.5), 1.0, 0)) == []


def test_colours_have_hues_well_apart():
    def hue(rgb):
        red, green, blue = rgb
        return math.degrees(math.atan2(math.sqrt(3) * (green - blue), 2 * red - green - blue))

    def apart(one, other):
        return abs((one - other + 180) % 360 - 180)

    for tones in COLOURS.values():
        assert apart(hue(tones[0]), hue(tones[1])) < 10
    for (first, _), (second, _) in itertools.combinations(COLOURS.values(), 2):
        assert apart(hue(first), hue(second)) > 25
