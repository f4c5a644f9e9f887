"""Windows made anew, windows with prompts of their own, and pictures that join themselves."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from small_bases import SETTINGS, add_random_lora, drive, flux, noise, random_text

from scale_dit.errors import UserError
from scale_dit.grid import Grid
from scale_dit.local_control import WindowPrompt, WindowText, local_prompts, remake
from scale_dit.method import Method
from scale_dit.models.flux1 import Flux1
from scale_dit.regions import Region, blending, moved, regions_around, share_of_boxes, whole_windows
from scale_dit.sampling import LowPass, low_pass, make_scheduler
from scale_dit.stage import LocalPrompt, Stage
from scale_dit.wrapping import wrap_shift

HIGH, WIDE = 16, 20
METHOD = Method(scale=2, window=4, halo_cells=1, order="hilbert")


@pytest.fixture(scope="module")
def base() -> Flux1:
    driven = drive(flux())
    add_random_lora(driven)
    return driven


@pytest.fixture(scope="module")
def stage(base: Flux1) -> Stage:
    plan = METHOD.plan(SETTINGS, HIGH * 16, WIDE * 16)
    return Stage(base, plan, random_text(1, base.transformer), None, 1.0, keys_values(base, plan, draft()))


def draft() -> torch.Tensor:
    return noise(1, 16, HIGH, WIDE, seed=8)


@torch.no_grad()
def keys_values(base: Flux1, plan, latents: torch.Tensor) -> list:
    tokens = base.pack(latents, plan.layout.guidance_order)
    return base.guidance_pass(tokens, random_text(1, base.transformer).pooled, plan, 1.0)


def scheduler(start: float = 1.0):
    return make_scheduler(3, 1.0, start, torch.device("cpu"))


def touched(rows: slice, columns: slice) -> torch.Tensor:
    tokens = torch.zeros(HIGH, WIDE, dtype=torch.bool)
    tokens[rows, columns] = True
    return tokens


@pytest.mark.parametrize("shift_windows", [False, True])
@torch.no_grad()
def test_the_box_of_the_whole_picture_is_the_picture(base, stage, shift_windows):
    method = dataclasses.replace(METHOD, shift_windows=shift_windows)
    whole = dataclasses.replace(stage, plan=method.plan(SETTINGS, HIGH * 16, WIDE * 16))
    everything = Region(range(HIGH), range(WIDE), torch.ones(HIGH, WIDE, dtype=torch.bool))
    latents = noise(1, 16, 2 * HIGH, 2 * WIDE)
    wanted = whole.velocity(latents, 0.6)
    torch.testing.assert_close(whole.within(everything).velocity(latents, 0.6), wanted, rtol=0, atol=1e-5)
    finished = noise(1, 16, 2 * HIGH, 2 * WIDE, seed=1)
    again = remake(whole, everything.chosen, finished, latents, scheduler())
    torch.testing.assert_close(again, whole.sample(latents, scheduler()), rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_box_sees_the_picture_and_the_draft_where_they_are(base, stage):
    """Where text reads no image, a window reads nothing beyond its box, if the box is wide enough for every block."""
    transformer = flux()
    short = drive(transformer)
    del transformer.transformer_blocks[1:], transformer.single_transformer_blocks[:]
    plan = METHOD.plan(SETTINGS, HIGH * 16, WIDE * 16)
    plan = dataclasses.replace(plan, layout=dataclasses.replace(plan.layout, text_reads_image=False))
    whole = Stage(short, plan, random_text(1, transformer), None, 1.0, keys_values(short, plan, draft()))
    (region,) = regions_around(plan.layout, whole_windows(touched(slice(5, 6), slice(9, 10)), plan.layout))
    assert region.tokens < HIGH * WIDE // 2
    latents, grid = noise(1, 16, 2 * HIGH, 2 * WIDE), plan.layout.image
    inside = whole.within(region).velocity(region.crop(latents, grid), 0.6)
    wanted = region.crop(whole.velocity(latents, 0.6), grid)
    mask = region.mask(inside)
    torch.testing.assert_close(inside[..., mask], wanted[..., mask], rtol=0, atol=1e-5)
    elsewhere = dataclasses.replace(region, rows=range(4, 4 + len(region.rows)))
    other = whole.within(elsewhere).velocity(region.crop(latents, grid), 0.6)
    assert not torch.allclose(other[..., mask], wanted[..., mask], atol=1e-3), "the ids and the draft matter"


def pixels(tokens: torch.Tensor) -> torch.Tensor:
    """Latents that tokens cover."""
    return tokens.repeat_interleave(2, 0).repeat_interleave(2, 1)


@pytest.mark.parametrize("wrap", ["none", "both"])
@torch.no_grad()
def test_only_chosen_windows_change(base, stage, wrap):
    layout = stage.plan.layout
    if wrap == "both":
        still = stage
        stage = dataclasses.replace(stage, moved=lambda step: (still, (0, 10) if step == 1 else (0, 0)))
    finished, eps = noise(1, 16, 2 * HIGH, 2 * WIDE, seed=1), noise(1, 16, 2 * HIGH, 2 * WIDE)
    chosen = whole_windows(touched(slice(0, 1), slice(4, 8)), layout)
    steps = []
    with CountedTokens(base) as counted:
        result = remake(stage, chosen, finished, eps, scheduler(0.7), lambda *step: steps.append(step))
    assert torch.equal(chosen, touched(slice(0, 4), slice(4, 8)))
    assert torch.equal(result[..., ~pixels(chosen)], finished[..., ~pixels(chosen)])
    assert (result != finished)[..., pixels(chosen)].all()
    assert share_of_boxes(chosen, layout) == pytest.approx(8 * 12 / (HIGH * WIDE))
    inside = 8 * 12 if wrap == "none" else 8 * 10
    assert counted.tokens == [8 * 12, inside, 8 * 12], "the cost is that of the boxes"
    first, second = (latents for _, _, latents in steps[:2])
    later = make_scheduler(3, 1.0, 0.7, torch.device("cpu"), first_step=1)
    assert torch.equal(remake(stage, chosen, finished, eps, later, latents=first), result), "goes on bit by bit"
    assert not torch.equal(first, second)


class CountedTokens:
    """The picture's tokens in each pass of a base."""

    def __init__(self, base: Flux1):
        self.base, self.tokens = base, []

    def __enter__(self):
        self.handle = self.base.transformer.x_embedder.register_forward_pre_hook(
            lambda module, arguments: self.tokens.append(arguments[0].shape[1])
        )
        return self

    def __exit__(self, *error: object):
        self.handle.remove()


@torch.no_grad()
def test_the_pull_knows_what_stays(stage):
    """A perfect draft pulls a window as it pulls the whole, since the velocity of what stays is known."""
    finished, eps = noise(1, 16, 2 * HIGH, 2 * WIDE, seed=1), noise(1, 16, 2 * HIGH, 2 * WIDE)
    pulled = dataclasses.replace(stage, pull=(finished, LowPass(1.0, "constant")))
    chosen = touched(slice(4, 12), slice(8, 16))
    with_pull, without = (
        remake(each, chosen, finished, eps, make_scheduler(1, 1.0, 1.0, torch.device("cpu")))
        for each in (pulled, stage)
    )
    still = low_pass(without - finished, METHOD.scale)
    mask = pixels(chosen)
    torch.testing.assert_close(with_pull[..., mask], (without - still)[..., mask], rtol=0, atol=1e-4)


@torch.no_grad()
def test_windows_that_are_made_anew_keep_their_own_prompts(base, stage):
    layout, other = stage.plan.layout, random_text(1, base.transformer, seed=7)
    finished, eps = noise(1, 16, 2 * HIGH, 2 * WIDE, seed=1), noise(1, 16, 2 * HIGH, 2 * WIDE)
    here, elsewhere = touched(slice(4, 8), slice(4, 8)), touched(slice(12, 16), slice(16, 20))

    def remade(*texts: torch.Tensor) -> torch.Tensor:
        local = local_prompts([WindowText(tokens, other) for tokens in texts], layout)
        return remake(dataclasses.replace(stage, local=local), here, finished, eps, scheduler())

    assert torch.equal(remade(), remade(elsewhere))
    assert not torch.allclose(remade(), remade(here), atol=1e-2)


def test_a_picture_that_is_chosen_whole_is_put_in_whole():
    assert blending(torch.ones(4, 6, dtype=torch.bool), 2).eq(1).all()


def test_new_pixels_are_blended_inside_their_windows():
    chosen = touched(slice(4, 8), slice(16, 20))
    weights = blending(chosen.repeat_interleave(16, 0).repeat_interleave(16, 1), 16)
    assert weights.shape == (16 * HIGH, 16 * WIDE)
    outside = torch.ones_like(weights, dtype=torch.bool)
    outside[64:128, 256:320] = False
    assert (weights[outside] == 0).all()
    assert (weights[80:112, 272:320] == 1).all(), "at the picture's edge there is nothing to blend with"
    assert torch.equal(weights[64:80, 300], (torch.arange(16) + 0.5) / 16)
    joined = blending(chosen, 2, "horizontal")
    assert joined[6, 16:].tolist() == [0.25, 0.75, 0.75, 0.25], "its right edge meets what stays"


def test_boxes_outside_the_picture_are_named(stage):
    with pytest.raises(UserError, match=r"the box \[0, 0, 321, 16\] is not .* inside the picture of 320 x 256"):
        WindowPrompt((0, 0, 321, 16), "a star").tokens(stage.plan.layout.image, 16)


@torch.no_grad()
def test_windows_read_their_own_prompt(base, stage):
    latents, grid = noise(1, 16, 2 * HIGH, 2 * WIDE), stage.plan.layout.image
    other = random_text(1, base.transformer, seed=7)
    chosen = touched(slice(8, 12), slice(8, 12))
    (region,) = regions_around(stage.plan.layout, chosen)
    local = dataclasses.replace(stage, local=[LocalPrompt(region, other)])
    plain, both = stage.velocity(latents, 0.6), local.velocity(latents, 0.6)
    assert torch.equal(both[..., ~pixels(chosen)], plain[..., ~pixels(chosen)])
    alone = dataclasses.replace(stage.within(region), text=other).velocity(region.crop(latents, grid), 0.6)
    assert torch.equal(both[..., pixels(chosen)], alone[..., region.mask(alone)])
    assert not torch.allclose(both[..., pixels(chosen)], plain[..., pixels(chosen)], atol=1e-2)


def test_texts_change_over_a_cell(stage):
    chosen = touched(slice(8, 16), slice(8, 16))
    (part,) = local_prompts([WindowText(chosen, stage.text)], stage.plan.layout)
    weights = part.region.paste(torch.zeros(HIGH, WIDE), part.weights, stage.plan.layout.image)
    assert (weights[~chosen] == 0).all()
    assert weights[8:12, 12].tolist() == [0.25, 0.75, 1, 1]
    assert weights[12, 14:17].tolist() == [0.75, 0.25, 0]
    assert (weights[12:, 10:14] == 1).all(), "the picture ends below"
    (moved_part,) = local_prompts([WindowText(chosen, stage.text)], stage.plan.layout, (0, 2))
    assert moved_part.region.columns.start == part.region.columns.start + 2
    assert torch.equal(moved_part.weights, part.weights[:, : moved_part.weights.shape[1]])


@pytest.mark.parametrize("draft_grid", [Grid(16, 32, 8), Grid(16, 29, 8), None])
@pytest.mark.parametrize("wrap", ["none", "horizontal", "both"])
def test_steps_move_pictures_everywhere(draft_grid, wrap):
    image, below = Grid(64, 128, 8), draft_grid or Grid(1, 1, 1)
    shifts = [wrap_shift(image, draft_grid, wrap, step) for step in range(28)]
    assert shifts[0].image == (0, 0)
    for axis, (side, draft_side) in enumerate(((64, below.height), (128, below.width))):
        places = {shift.image[axis] for shift in shifts}
        assert all(place % 8 == 0 for place in places)
        if wrap == "none" or (wrap == "horizontal" and axis == 0):
            assert places == {0}
        else:
            assert len(places) >= side / 8 / 2, "most borders of cells are an edge at some step"
        assert all(abs(s.image[axis] / side - s.draft[axis] / draft_side) <= 0.5 / draft_side for s in shifts)


def test_an_unknown_wrap_is_named():
    with pytest.raises(UserError, match="unknown wrap 'vertical': use one of none, horizontal, both"):
        wrap_shift(Grid(8, 8, 2), None, "vertical", 0)


@torch.no_grad()
def test_a_picture_that_joins_itself_is_moved_and_moved_back(base, stage):
    """At each step the picture and the draft under it are seen from another edge on."""
    grid, latents = stage.plan.layout.image, noise(1, 16, 2 * HIGH, 2 * WIDE)
    there = dataclasses.replace(stage, keys_values=keys_values(base, stage.plan, draft().roll((8, 10), (-2, -1))))
    seamless = dataclasses.replace(stage, moved=lambda step: (there, (8, 10)) if step else (stage, (0, 0)))
    two_steps = make_scheduler(2, 1.0, 1.0, torch.device("cpu"))
    halfway = latents - 0.5 * stage.velocity(latents, 1.0)
    back = moved(there.velocity(moved(halfway, grid, (8, 10)), 0.5), grid, (-8, -10))
    torch.testing.assert_close(seamless.sample(latents, two_steps), halfway - 0.5 * back, rtol=0, atol=1e-5)
    assert not torch.allclose(back, stage.velocity(halfway, 0.5), atol=1e-2)
