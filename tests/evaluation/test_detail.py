"""The detail score on pictures whose right order is known."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from scale_dit.data.scenes import render, sample_scene
from scale_dit.errors import UserError
from scale_dit.evaluation.detail import Detail, detail_score, radial_log_power
from scale_dit.evaluation.metric import Record

SIDE = 512
SCALE = 4


@functools.cache
def scenes():
    return [sample_scene(seed, "test") for seed in range(6)]


@functools.cache
def truth() -> Tensor:
    return render(scenes(), SIDE, SIDE)


def bicubic() -> Tensor:
    draft = interpolate(truth(), scale_factor=1 / SCALE, mode="bicubic", antialias=True).clamp(0, 1)
    return interpolate(draft, size=(SIDE, SIDE), mode="bicubic").clamp(0, 1)


def mean_score(images: Tensor) -> float:
    return float(detail_score(images, truth(), SCALE).mean())


def mosaic(tiles: Tensor, window: int = 64) -> Tensor:
    """Every window taken from a random picture, at the same place."""
    generator = torch.Generator().manual_seed(0)
    count = SIDE // window
    choice = torch.randint(len(tiles), (len(tiles), count, count), generator=generator)
    choice = choice.repeat_interleave(window, 1).repeat_interleave(window, 2)
    rows, columns = torch.arange(SIDE)[None, :, None], torch.arange(SIDE)[None, None, :]
    return tiles.permute(0, 2, 3, 1)[choice, rows, columns].permute(0, 3, 1, 2)


def test_the_truth_scores_one():
    assert mean_score(truth()) == 1.0


def test_the_same_scene_with_another_texture_seed_scores_almost_one():
    other = render([replace(scene, seed=scene.seed + 10_000) for scene in scenes()], SIDE, SIDE)
    assert mean_score(other) > 0.85


def test_upscaling_adds_resolution_but_no_detail():
    assert mean_score(bicubic()) < 0.3


def test_noise_is_not_detail():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(truth().shape, generator=generator)
    assert mean_score(torch.rand(truth().shape, generator=generator)) < 0.1
    assert mean_score((truth() + 0.05 * noise).clamp(0, 1)) < 0.5
    assert mean_score((bicubic() + 0.02 * noise).clamp(0, 1)) < 0.5


def test_mosaics_are_not_detail():
    generator = torch.Generator().manual_seed(0)
    flat = interpolate(torch.rand(6, 3, SIDE // 64, SIDE // 64, generator=generator), size=(SIDE, SIDE))
    assert mean_score(flat) < 0.5
    assert mean_score(mosaic(truth())) < 0.6


def test_less_and_more_blur_are_told_apart():
    scores = [mean_score(avg_pool2d(truth(), size, 1, size // 2, count_include_pad=False)) for size in (1, 3, 7)]
    assert scores[0] > scores[1] > scores[2]


def test_an_even_picture_scores_zero():
    assert mean_score(torch.full_like(truth(), 0.5)) == 0.0


def test_power_of_white_noise_is_flat_at_the_level_that_the_unit_says():
    """Noise of 16 grey levels has P / P_level exponentially distributed with mean 256 at every frequency."""
    noise = 128 + torch.randn(1, 512, 512, generator=torch.Generator().manual_seed(0)) * 16
    frequencies, power = radial_log_power((noise / 255).expand(3, -1, -1))
    exponential = -torch.rand(100_000, generator=torch.Generator().manual_seed(1)).log()
    expected = torch.log10(1 + 256 * exponential).mean()
    inner = power.mean(dim=0)[frequencies > 0.1]
    assert torch.allclose(inner, expected.expand_as(inner), atol=0.06)


@pytest.mark.parametrize("shape", [(65, 131), (48, 200), (33, 33)])
def test_any_size_is_measured(shape):
    image = torch.rand(1, 3, *shape)
    assert detail_score(image, image, SCALE).tolist() == [1.0]


def test_bad_input_is_named():
    with pytest.raises(UserError, match="one size"):
        detail_score(torch.rand(1, 3, 64, 64), torch.rand(1, 3, 32, 32), SCALE)
    with pytest.raises(UserError, match="above 1"):
        Detail(scale=1)


def test_the_metric_averages_pictures_and_skips_those_without_truth():
    metric = Detail(SCALE)
    true = (truth() * 255).round().to(torch.uint8)
    records = [Record(i, "", i, reference=true[i] if i < 2 else None) for i in range(3)]
    metric.update("same", true[:3], [""] * 3, records)
    metric.update("flat", torch.zeros_like(true[:3]), [""] * 3, records)
    figure = metric.compute("same")["detail"]
    assert (figure.value, figure.low, figure.high, figure.n) == (1.0, 1.0, 1.0, 2)
    assert metric.compute("flat")["detail"].value == 0.0
    assert metric.compute("nobody") == {}
    assert metric.per_picture("same") == {"detail": {0: 1.0, 1: 1.0}}
