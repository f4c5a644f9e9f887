from __future__ import annotations

import math

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxPosEmbed

from scale_dit import anchors
from scale_dit.anchors import (
    guidance_ids,
    image_ids,
    ntk_theta,
    yarn_frequencies,
    yarn_rotary,
    yarn_temperature,
)
from scale_dit.errors import UserError
from scale_dit.grid import Grid
from scale_dit.layout import Layout

LAYOUT = Layout(4, Grid(16, 12, 2), Grid(4, 4, 2), window=4, order="hilbert")


@pytest.mark.parametrize("order", ["raster", "window", "hilbert"])
def test_image_ids_follow_the_memory_order(order):
    layout = Layout(4, Grid(7, 5, 2), window=4, order=order)
    ids = image_ids(layout)
    assert ids.dtype == torch.float32
    assert torch.equal(ids[:, 0], torch.zeros(35))
    assert torch.equal((ids[:, 1] * 5 + ids[:, 2]).long(), layout.image_order)


@pytest.mark.parametrize(
    ("name", "rows", "columns"),
    [
        ("scaled", [0.0, 4.0, 8.0, 12.0], [0.0, 3.0, 6.0, 9.0]),
        ("centred", [1.5, 5.5, 9.5, 13.5], [1.0, 4.0, 7.0, 10.0]),
        ("none", [0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 2.0, 3.0]),
    ],
)
def test_anchors_use_the_true_scale_of_each_axis(name, rows, columns):
    ids = guidance_ids(LAYOUT, name)
    assert ids.dtype == torch.float32
    raster = ids[LAYOUT.guidance_order.argsort()].view(4, 4, 3)
    assert raster[..., 0].eq(0).all()
    assert raster[:, 0, 1].tolist() == rows
    assert raster[0, :, 2].tolist() == columns


def test_centred_anchors_are_the_mean_of_the_tokens_they_cover():
    layout = Layout(0, Grid(16, 12, 2), Grid(4, 3, 2))
    covered = image_ids(layout)[layout.image_order.argsort()].view(4, 4, 3, 4, 3).mean((1, 3)).view(12, 3)
    torch.testing.assert_close(guidance_ids(layout, "centred"), covered[layout.guidance_order])


def test_guidance_pass_and_image_pass_agree_on_the_memory_order():
    for order in ("raster", "window", "hilbert"):
        layout = Layout(4, Grid(32, 28, 2), Grid(9, 7, 2), window=8, order=order)
        for reach in ("adjacent", "all"):
            assert torch.equal(Layout.for_guidance(layout.guidance, reach, order).image_order, layout.guidance_order)


def test_unknown_anchors_name_the_known_and_no_guidance_has_no_ids():
    with pytest.raises(UserError, match=r"'middle'.*centred, none, scaled"):
        guidance_ids(LAYOUT, "middle")
    assert guidance_ids(Layout(4, Grid(4, 4, 2))).shape == (0, 3)


def test_a_new_anchor_is_one_function(monkeypatch):
    monkeypatch.setattr(anchors, "ANCHORS", dict(anchors.ANCHORS))

    @anchors.register
    def last(s):
        return s, s - 1

    assert guidance_ids(LAYOUT, "last")[:, 1].max() == 15


def test_ntk_divides_the_slowest_frequency_by_the_factor_and_keeps_the_fastest():
    theta, dim, factor = 10_000.0, 56, 4.0
    exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    before, after = theta**-exponents, ntk_theta(theta, factor, dim) ** -exponents
    assert after[0] == before[0] == 1
    torch.testing.assert_close(before[-1] / after[-1], torch.tensor(factor, dtype=torch.float64))
    assert ntk_theta(theta, 1.0, dim) == theta
    with pytest.raises(UserError, match="-1"):
        ntk_theta(theta, -1, dim)


def test_yarn_divides_slow_frequencies_keeps_fast_ones_and_blends_those_between():
    theta, dim, length = 10_000.0, 56, 4096
    plain = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    found, turns = yarn_frequencies(theta, dim, 4.0, length), length * plain / (2 * math.pi)
    assert torch.equal(found[turns > 32], plain[turns > 32])
    assert torch.equal(found[turns < 1], plain[turns < 1] / 4)
    between = (turns > 1) & (turns < 32)
    assert between.sum() > 3
    share = (turns - 1) / 31
    torch.testing.assert_close(found[between], (plain * share + plain / 4 * (1 - share))[between])
    assert (found.diff() < 0).all()
    assert yarn_temperature(4.0) == pytest.approx(1.1386294)
    assert yarn_temperature(1.0) == 1.0


def test_yarn_at_factor_one_is_the_stock_embedding_and_leaves_other_axes_alone():
    axes = (4, 6, 6)
    ids = torch.tensor([[0.0, 0.0, 0.0], [2.0, 3.0, 60.0], [0.0, 4.5, 1.0]])
    stock = FluxPosEmbed(10_000, axes)(ids)
    for ours, theirs in zip(yarn_rotary(ids, 10_000, axes, (1.0, 1.0, 1.0), 64), stock, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    cosine, _ = yarn_rotary(ids, 10_000, axes, (1.0, 2.0, 1.0), 64)
    scaled = cosine / yarn_temperature(2.0)
    torch.testing.assert_close(scaled[:, [0, 1, 2, 3, *range(10, 16)]], stock[0][:, [0, 1, 2, 3, *range(10, 16)]])
    assert not torch.allclose(scaled[1:, 4:10], stock[0][1:, 4:10])
