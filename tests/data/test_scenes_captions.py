"""Captions say what is visible, in few words."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from scale_dit.data.captions import MAXIMUM_WORDS, caption, relation
from scale_dit.data.scenes import COLOURS, SHAPES, Scene, SceneObject, sample_scene, visible_objects

CAPTIONS = [(scene, caption(scene, seed)) for seed, scene in enumerate(map(sample_scene, range(1500)))]


def test_every_visible_object_is_named_with_colour_and_shape_and_no_other():
    for scene, text in CAPTIONS:
        words = text.replace(",", " ").split()
        seen = visible_objects(scene)
        assert Counter(word for word in words if word in COLOURS) == Counter(found.item.colour for found in seen)
        assert Counter(word for word in words if word in SHAPES) == Counter(found.item.shape for found in seen)


def test_captions_are_short_and_plain():
    vocabulary = set()
    for _, text in CAPTIONS:
        words = text.replace(",", " ").split()
        vocabulary.update(words)
        assert len(words) <= MAXIMUM_WORDS
        assert len(words) + text.count(",") <= 58
        assert re.fullmatch(r"[a-z-]+(,? [a-z-]+)*", text)
    assert len(vocabulary) < 100


def test_same_seed_same_caption_and_several_phrasings():
    scene = sample_scene(3, zoom=1.0)
    assert caption(scene, 1) == caption(scene, 1)
    assert len({caption(scene, seed) for seed in range(50)}) > 5


def test_two_objects_are_related_as_they_lie():
    red = SceneObject("circle", "red", "plain", 0.2, (0.2, 0.5), 0.0)
    blue = SceneObject("star", "blue", "plain", 0.2, (0.8, 0.55), 0.0)
    scene = Scene((red, blue), "sand", 1.0, (0.5, 0.5), 1.0, 0)
    related = [text for text in (caption(scene, seed) for seed in range(60)) if " of a " in text]
    assert len(related) > 10
    for text in related:
        link = "left of" if text.index("red") < text.index("blue") else "right of"
        assert link in text


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((0.2, 0.5), (0.8, 0.4), "left of"),
        ((0.8, 0.5), (0.2, 0.4), "right of"),
        ((0.5, 0.1), (0.6, 0.9), "above"),
        ((0.5, 0.9), (0.6, 0.1), "below"),
    ],
)
def test_relation_follows_the_longer_axis(first, second, expected):
    assert relation(first, second) == expected


def test_close_ups_say_what_part_is_seen():
    red = SceneObject("square", "red", "striped", 0.6, (0.4, 0.5), 0.0)
    inside = Scene((red,), "brick", 8.0, (0.4, 0.5), 1.0, 0)
    edge = Scene((red,), "brick", 3.0, (0.61, 0.5), 1.0, 0)
    empty = Scene((red,), "brick", 8.0, (0.9, 0.9), 1.0, 0)
    assert "part of a huge red striped square filling the picture" in caption(inside, 0)
    assert "part of a huge red striped square filling the left side" in caption(edge, 0)
    assert "red" not in caption(empty, 0)
    assert "brick" in caption(empty, 0)
    assert any("close-up" in caption(edge, seed) for seed in range(10))
