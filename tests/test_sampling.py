"""Noise schedules, the Euler loop, and low-pass guidance."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from small_bases import noise

from scale_dit.errors import UserError
from scale_dit.sampling import (
    LOW_PASS_SCHEDULES,
    LowPass,
    add_noise,
    denoise,
    low_pass,
    low_pass_guidance,
    make_scheduler,
    training_levels,
    upsample_latents,
)

CPU = torch.device("cpu")


@given(
    steps=st.integers(1, 60),
    shift=st.floats(0.3, 12),
    start=st.floats(0.05, 1),
)
@settings(deadline=None, max_examples=40)
def test_levels_fall_from_the_start_to_zero_by_the_shift_formula(steps, shift, start):
    scheduler = make_scheduler(steps, shift, start, CPU)
    sigmas = scheduler.sigmas.double()
    assert len(sigmas) == steps + 1
    assert sigmas[0].item() == pytest.approx(start, rel=1e-6)
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()
    torch.testing.assert_close(scheduler.timesteps.double(), sigmas[:-1] * 1000, rtol=1e-6, atol=1e-6)
    unshifted = sigmas[:-1] / (shift - (shift - 1) * sigmas[:-1])
    even = unshifted[0] * (1 - torch.arange(steps, dtype=torch.float64) / steps)
    torch.testing.assert_close(unshifted, even, rtol=1e-4, atol=1e-6)


def test_shift_three_by_hand():
    sigmas = make_scheduler(4, 3.0, 1.0, CPU).sigmas
    torch.testing.assert_close(sigmas, torch.tensor([1, 9 / 10, 3 / 4, 1 / 2, 0]))


@pytest.mark.parametrize("steps", [1, 4, 28])
def test_shift_one_is_the_stock_flux_grid(steps):
    stock = FlowMatchEulerDiscreteScheduler(shift=1.0)
    stock.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist())
    scheduler = make_scheduler(steps, 1.0, 1.0, CPU)
    torch.testing.assert_close(scheduler.sigmas, stock.sigmas, rtol=0, atol=1e-6)
    torch.testing.assert_close(scheduler.timesteps, stock.timesteps, rtol=0, atol=1e-3)


def test_the_shift_does_not_grow_with_the_picture():
    """diffusers' shift at 65,536 tokens leaves no level of 28 below 0.99; ours still spends steps on detail."""
    growing = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    growing.set_timesteps(sigmas=torch.linspace(1, 1 / 28, 28).tolist(), mu=11.55)
    assert growing.sigmas[-2] > 0.99
    scheduler = make_scheduler(28, 3.0, 1.0, CPU)
    assert not scheduler.config.use_dynamic_shifting
    assert (scheduler.sigmas < 0.5).sum() > 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 3.0, 1.0), "number of steps is 0"),
        ((4, 3.0, 0.0), "start is 0.0"),
        ((4, 3.0, 1.2), "start is 1.2, but it must be above 0 and at most 1"),
        ((4, 0.0, 1.0), "shift is 0.0"),
        ((4, float("nan"), 1.0), "shift is nan"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        make_scheduler(*arguments, CPU)


@pytest.mark.parametrize(("steps", "start"), [(1, 1.0), (7, 1.0), (5, 0.6)])
def test_the_exact_velocity_of_a_known_picture_leads_to_it(steps, start):
    clean, eps = noise(2, 4, 6, 8, seed=1), noise(2, 4, 6, 8, seed=2)
    levels = []

    def velocity(latents, sigma):
        levels.append(sigma)
        torch.testing.assert_close(latents, add_noise(clean, eps, sigma), rtol=0, atol=1e-5)
        return eps - clean

    scheduler = make_scheduler(steps, 3.0, start, CPU)
    result = denoise(velocity, add_noise(clean, eps, start), scheduler)
    torch.testing.assert_close(result, clean, rtol=0, atol=1e-5)
    assert levels == scheduler.sigmas[:-1].tolist()


def test_denoising_stays_float32_with_a_bfloat16_model():
    scheduler = make_scheduler(3, 1.0, 1.0, CPU)
    result = denoise(lambda latents, sigma: latents.bfloat16() * 0, noise(1, 4, 2, 2).bfloat16(), scheduler)
    assert result.dtype == torch.float32


def test_callback_sees_every_step_and_may_change_the_latents():
    seen = []

    def callback(index, timestep, latents):
        seen.append((index, timestep.item()))
        return torch.zeros_like(latents) if index == 1 else None

    scheduler = make_scheduler(3, 1.0, 1.0, CPU)
    result = denoise(lambda latents, sigma: torch.ones_like(latents), noise(1, 4, 2, 2), scheduler, callback)
    assert seen == list(enumerate(scheduler.timesteps.tolist()))
    torch.testing.assert_close(result, torch.full((1, 4, 2, 2), -1 / 3))


def test_low_pass_keeps_a_slope_and_drops_a_chessboard():
    flat = torch.full((1, 2, 16, 24), 0.7)
    torch.testing.assert_close(low_pass(flat, 4.0), flat)
    rows, columns = torch.meshgrid(torch.arange(16), torch.arange(24), indexing="ij")
    chessboard = ((rows + columns) % 2 * 2.0 - 1)[None, None]
    assert low_pass(chessboard, 4.0).abs().max() < 1e-6
    slope = columns[None, None] / 24.0
    torch.testing.assert_close(low_pass(slope, 4.0)[..., 4:20], slope[..., 4:20], rtol=0, atol=0.02)
    torch.testing.assert_close(low_pass(chessboard, 1.0), chessboard)


def test_low_pass_guidance_is_off_at_strength_zero_and_at_the_end():
    velocity, latents, draft = noise(1, 4, 8, 8), noise(1, 4, 8, 8, seed=4), noise(1, 4, 8, 8, seed=5)
    assert torch.equal(low_pass_guidance(velocity, latents, draft, 0.7, LowPass(0.0), 4.0), velocity)
    late = low_pass_guidance(velocity, latents, draft, 1e-3, LowPass(1.0), 4.0)
    torch.testing.assert_close(late, velocity, rtol=0, atol=0.02)


def test_full_strength_at_pure_noise_takes_the_low_frequencies_from_the_draft_and_the_rest_from_the_model():
    velocity, latents, draft = noise(1, 4, 8, 8), noise(1, 4, 8, 8, seed=4), noise(1, 4, 8, 8, seed=5)
    guided = low_pass_guidance(velocity, latents, draft, 1.0, LowPass(1.0), 4.0)
    change = guided - velocity
    torch.testing.assert_close(change, low_pass(latents - draft - velocity, 4.0))
    everything = low_pass_guidance(velocity, latents, draft, 1.0, LowPass(1.0), 1.0)  # scale 1: all frequencies are low
    torch.testing.assert_close(latents - everything, draft)


def test_pull_decays_as_a_raised_cosine():
    velocity, latents, draft = torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    for sigma, weight in ((1.0, 1.0), (0.5, 0.5), (1 / 3, 0.25)):
        pulled = low_pass_guidance(velocity, latents, draft, sigma, LowPass(1.0), 2.0)
        torch.testing.assert_close(pulled * sigma, torch.full_like(pulled, weight))


def test_upsampling_latents_keeps_their_place():
    latents = torch.zeros(1, 1, 4, 6)
    latents[..., 1, 2] = 1
    large = upsample_latents(latents, 16, 24)
    peak = divmod(int(large.argmax()), 24)
    assert large.shape == (1, 1, 16, 24)
    assert peak[0] in (5, 6)
    assert peak[1] in (9, 10)


def test_training_levels_are_logit_normal_and_shifted_towards_noise():
    generator = torch.Generator().manual_seed(0)
    plain = training_levels(20_000, 1.0, CPU, generator)
    shifted = training_levels(20_000, 3.0, CPU, generator.manual_seed(0))
    assert plain.logit().mean().item() == pytest.approx(0, abs=0.03)
    assert plain.logit().std().item() == pytest.approx(1, abs=0.03)
    wide = training_levels(20_000, 1.0, CPU, generator.manual_seed(0), spread=1.6)
    torch.testing.assert_close(wide.logit(), 1.6 * plain.logit(), rtol=1e-3, atol=1e-3)
    assert shifted.median().item() == pytest.approx(0.75, abs=0.01)  # 3/2 / (1 + 2/2)
    # the same map as the sampler's: a level of the unshifted grid goes where its schedule has it
    sigmas = make_scheduler(4, 3.0, 1.0, CPU).sigmas[:4]
    grid = torch.tensor([1.0, 0.75, 0.5, 0.25])
    torch.testing.assert_close(3 * grid / (1 + 2 * grid), sigmas)
    order = plain.argsort()
    torch.testing.assert_close(shifted[order], 3 * plain[order] / (1 + 2 * plain[order]))


def test_the_pull_goes_with_the_noise_level_as_its_schedule_says():
    weights = {name: [LowPass(0.5, name).weight(sigma) for sigma in (1.0, 0.5, 0.0)] for name in LOW_PASS_SCHEDULES}
    assert weights["cosine"] == pytest.approx([0.5, 0.25, 0.0])
    assert weights["linear"] == [0.5, 0.25, 0.0]
    assert weights["constant"] == [0.5, 0.5, 0.5]
    until = LowPass(0.5, "constant", until=0.6)
    assert [until.weight(sigma) for sigma in (0.7, 0.6, 0.5)] == [0.5, 0.5, 0.0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((1.5,), "low_pass is 1.5"),
        ((0.5, "steep"), "unknown low_pass_schedule 'steep': use one of constant, cosine, linear"),
        ((0.5, "cosine", 2.0), "low_pass_until is 2.0"),
    ],
)
def test_a_pull_that_cannot_be_is_refused(values, message):
    with pytest.raises(UserError, match=message):
        LowPass(*values)


@pytest.mark.parametrize("first", [0, 1, 4])
def test_sampling_goes_on_from_any_step_bit_by_bit(first):
    velocity = lambda latents, sigma: latents.sin() * sigma  # noqa: E731
    kept = {}
    begin = noise(1, 2, 3)
    whole = denoise(velocity, begin, make_scheduler(4, 3.0, 0.8, CPU), lambda i, t, x: kept.update({i + 1: x}))
    assert torch.equal(denoise(velocity, kept.get(first, begin), make_scheduler(4, 3.0, 0.8, CPU, first)), whole)
    with pytest.raises(UserError, match="first step is 5"):
        make_scheduler(4, 3.0, 0.8, CPU, 5)
