"""Pictures of procedural scenes: right contents, antialiased, detail at every scale."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch
from torch.nn.functional import avg_pool2d, interpolate

from scale_dit.data.parser import classify_colours
from scale_dit.data.scenes import GROUNDS, Scene, pack, render, render_packed, sample_scene
from scale_dit.data.textures import fractal_noise, hash_unit
from scale_dit.errors import UserError


def whole_scenes(count, split="test"):
    return [sample_scene(seed, split, zoom=1.0) for seed in range(count)]


def high_frequency_energy(pictures):
    """Energy above half of the Nyquist frequency along either axis, ``[B]``."""
    spectrum = torch.fft.fft2(pictures.mean(1)).abs().square()
    frequency = torch.fft.fftfreq(pictures.shape[-1]).abs()
    beyond = (frequency[:, None] > 0.125) | (frequency[None, :] > 0.125)
    return (spectrum * beyond).sum((1, 2))


def test_a_batch_is_its_scenes_one_by_one():
    scenes = [sample_scene(seed) for seed in range(6)]
    pictures = render(scenes, 128, 128)
    assert pictures.shape == (6, 3, 128, 128)
    assert pictures.dtype == torch.float32
    assert pictures.min() >= 0
    assert pictures.max() <= 1
    assert torch.equal(pictures, render(scenes, 128, 128))
    for scene, picture in zip(scenes, pictures, strict=True):
        torch.testing.assert_close(render([scene], 128, 128)[0], picture, atol=1e-5, rtol=0)


def test_packed_scenes_render_the_same():
    scenes = whole_scenes(3)
    assert torch.equal(render_packed(pack(scenes), 64, 64), render(scenes, 64, 64))


def test_a_large_picture_averages_to_the_small_one():
    scenes = whole_scenes(3) + [sample_scene(seed, "test") for seed in range(3)]
    difference = avg_pool2d(render(scenes, 1024, 1024), 4) - render(scenes, 256, 256)
    assert difference.square().mean((1, 2, 3)).sqrt().max() < 0.02
    assert difference.mean((2, 3)).abs().max() < 0.002


def test_detail_appears_only_at_higher_resolution():
    scenes = whole_scenes(4)
    large = render(scenes, 1024, 1024)
    enlarged = interpolate(render(scenes, 256, 256), scale_factor=4, mode="bicubic")
    assert (high_frequency_energy(large) > 5 * high_frequency_energy(enlarged)).all()


def test_a_close_up_is_the_crop_of_a_larger_picture():
    scene = sample_scene(5, "test", zoom=1.0)
    close = dataclasses.replace(scene, zoom=4.0, view_centre=(0.375, 0.625))
    crop = render([scene], 1024, 1024)[0, :, 512:768, 256:512]
    seen = classify_colours(render([close], 256, 256)[0].numpy())
    assert (seen == classify_colours(crop.numpy())).mean() > 0.995
    assert (seen >= 0).any()


@pytest.mark.parametrize("ground", list(GROUNDS))
def test_no_ground_holds_an_object_colour(ground):
    zooms = (1.0, 2.0, 5.0, 8.0)
    scenes = [Scene((), ground, zoom, (0.5, 0.5), 1.0, 104729 * seed) for zoom in zooms for seed in range(1, 5)]
    for picture in render(scenes, 128, 128):
        assert (classify_colours(picture.numpy()) == -1).all()
        assert picture.std() > 0.01


def test_wide_and_tall_pictures_keep_shapes():
    wide = sample_scene(3, "test", zoom=1.0, aspect=2.0)
    coloured = torch.from_numpy(classify_colours(render([wide], 128, 256)[0].numpy()) >= 0)
    round_objects = [item for item in wide.objects if item.shape in ("circle", "ring")]
    for item in round_objects or wide.objects:
        column, row = int(item.centre[0] * 128), int(item.centre[1] * 128)
        reach = int(item.radius * 128) - 2
        assert coloured[row - reach : row + reach, column - reach : column + reach].any()
    assert render([sample_scene(1, aspect=0.5)], 256, 128).shape == (1, 3, 256, 128)


def test_a_picture_of_another_aspect_is_refused():
    with pytest.raises(UserError, match="aspect=2"):
        render([sample_scene(1)], 128, 256)
    with pytest.raises(UserError, match="at least one"):
        render([], 64, 64)


def test_hash_is_uniform_and_fixed():
    x = torch.arange(256, dtype=torch.int32)
    values = hash_unit(x[:, None], x[None, :], torch.tensor(7, dtype=torch.int32))
    assert abs(float(values.mean())) < 0.01
    assert float(values.square().mean()) == pytest.approx(1 / 3, abs=0.01)
    neighbours = (values[1:] * values[:-1]).mean() / values.square().mean()
    assert abs(float(neighbours)) < 0.02
    # Pictures must stay the same on every device and in every release: a changed hash changes every texture.
    assert values[3, :4].tolist() == pytest.approx([0.6482809, 0.498346, 0.388131, 0.4844056], abs=1e-6)


def test_noise_octaves_fade_out_before_they_alias():
    """Noise rendered at twice the resolution adds detail but keeps what was there."""
    view = torch.tensor([[0.13, 0.29, 0.4, 0.4]])
    one = torch.ones(1)
    arguments = (view, one, one, torch.ones(1, 2), torch.tensor([3], dtype=torch.int32))
    coarse, fine = fractal_noise(*arguments, 64, 64), fractal_noise(*arguments, 128, 128)
    reduced = avg_pool2d(fine, 2)
    assert (reduced - coarse).std() < 0.4 * coarse.std()
    assert (fine - reduced.repeat_interleave(2, 1).repeat_interleave(2, 2)).std() > 0.1 * coarse.std()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_gpu_renders_the_same_picture_fast():
    scenes = [sample_scene(seed) for seed in range(256)]
    packed = {name: values.cuda() for name, values in pack(scenes).items()}
    difference = (render_packed(packed, 256, 256)[:8].cpu() - render(scenes[:8], 256, 256)).abs()
    assert difference.mean() < 1e-4
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(4):
        render_packed(packed, 256, 256)
    torch.cuda.synchronize()
    assert 4 * len(scenes) / (time.perf_counter() - started) > 1000
