"""English captions that say what the camera sees, in several phrasings and a small closed vocabulary."""

from __future__ import annotations

import random

from scale_dit.data.visibility import VisibleObject, visible_objects
from scale_dit.data.world import GROUNDS, Scene

# A word-piece tokenizer trained on captions keeps nearly every word whole, so this stays below 60 tokens.
MAXIMUM_WORDS = 48
CLOSE_UP_ZOOM = 1.5
_WHOLE = 0.95
_NUMBERS = ("no", "one", "two", "three", "four")
_PLACES = (
    ("in the top left", "at the top", "in the top right"),
    ("on the left", "in the middle", "on the right"),
    ("in the bottom left", "at the bottom", "in the bottom right"),
)
_SIDES = (
    ("the top left", "the top", "the top right"),
    ("the left side", "the middle", "the right side"),
    ("the bottom left", "the bottom", "the bottom right"),
)


def caption(scene: Scene, seed: int) -> str:
    """Describe the visible part of a scene; ``seed`` picks the phrasing.

    Lower case, commas as the only punctuation, at most `MAXIMUM_WORDS` words.
    """
    rng = random.Random(f"caption:{scene.seed}:{seed}")
    seen = visible_objects(scene)
    ground = rng.choice(GROUNDS[scene.ground].phrases)
    if not seen:
        return _empty(rng, ground, scene.zoom)
    rng.shuffle(seen)
    if len(seen) == 2 and all(found.visible >= _WHOLE for found in seen) and rng.random() < 0.6:
        body = _related(rng, *seen)
    elif len(seen) == 2:
        body = " and ".join(_placed(rng, found) for found in seen)
    else:
        body = ", ".join(_placed(rng, found) for found in seen)
    if scene.zoom >= CLOSE_UP_ZOOM and rng.random() < 0.7:
        opening = rng.choice(("a close-up of", "close-up,", "a close view of"))
        return f"{opening} {body}, on {ground}"
    if len(seen) > 1 and rng.random() < 0.35:
        number = _NUMBERS[len(seen)]
        return rng.choice((f"{number} shapes on {ground}, {body}", f"{number} objects, {body}, on {ground}"))
    return rng.choice((f"{body}, on {ground}", f"{body} on {ground}", f"on {ground}, {body}"))


def relation(first: tuple[float, float], second: tuple[float, float]) -> str:
    """How ``first`` lies from ``second`` along the longer axis between them (frame coordinates, y downwards)."""
    dx, dy = first[0] - second[0], first[1] - second[1]
    if abs(dx) >= abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def _empty(rng: random.Random, ground: str, zoom: float) -> str:
    if zoom < CLOSE_UP_ZOOM:
        return f"{ground}, no objects"
    return rng.choice((f"a close-up of {ground}", f"{ground}, no objects", f"a close view of {ground}, nothing else"))


def _related(rng: random.Random, first: VisibleObject, second: VisibleObject) -> str:
    link = relation(first.centre, second.centre)
    if link in ("left of", "right of") and rng.random() < 0.3:
        link = f"to the {link}"
    return f"{_name(rng, first)} {link} {_name(rng, second)}"


def _placed(rng: random.Random, found: VisibleObject) -> str:
    name = _name(rng, found)
    column, row = (min(2, int(3 * value)) for value in found.centre)
    if found.share > 0.8:
        return f"{name} filling the picture"
    if found.share > 0.3 and found.visible < _WHOLE:
        return f"{name} filling {_SIDES[row][column]}"
    return f"{name} {_PLACES[row][column]}"


def _name(rng: random.Random, found: VisibleObject) -> str:
    item = found.item
    words = [_size_word(found.size), item.colour]
    if item.pattern != "plain" or rng.random() < 0.4:
        words.append(item.pattern)
    name = " ".join([*words, item.shape])
    if found.visible < 0.7:
        return f"part of a {name}"
    return f"most of a {name}" if found.visible < _WHOLE else f"a {name}"


def _size_word(size: float) -> str:
    for limit, word in ((0.22, "small"), (0.34, "medium"), (0.6, "large")):
        if size < limit:
            return word
    return "huge"
