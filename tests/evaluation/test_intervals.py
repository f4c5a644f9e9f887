from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scale_dit.evaluation.intervals import (
    bootstrap_mean,
    bootstrap_ratio,
    paired_difference,
    recentred_bootstrap,
    wilson,
)


def test_wilson_agrees_with_scipy():
    from scipy.stats import binomtest

    for successes, n in [(0, 10), (3, 17), (170, 200), (200, 200)]:
        expected = binomtest(successes, n).proportion_ci(method="wilson")
        assert wilson(successes, n) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_wilson_refuses_what_is_no_share():
    with pytest.raises(ValueError, match="5 of 3"):
        wilson(5, 3)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=30))
def test_bootstrap_interval_holds_the_mean_within_the_range_of_values(values):
    low, high = bootstrap_mean(values, resamples=200)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9


def test_bootstrap_covers_the_true_mean_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        low, high = bootstrap_mean(generator.normal(size=60), resamples=400)
        covered += low <= 0 <= high
    assert 178 <= covered <= 199


def test_paired_difference_is_narrower_than_the_difference_of_intervals():
    generator = np.random.default_rng(0)
    base = generator.normal(size=100)
    method = {i: float(v + 0.1 + 0.01 * generator.normal()) for i, v in enumerate(base)}
    difference, low, high, n = paired_difference(method, dict(enumerate(base.tolist())))
    assert n == 100
    assert difference == pytest.approx(0.1, abs=0.01)
    assert 0 < low < high < 0.2


def test_paired_difference_uses_only_shared_pictures():
    assert paired_difference({0: 1.0, 1: 5.0}, {0: 0.5, 7: 3.0})[::3] == (0.5, 1)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_ratio_of_equal_values_is_one():
    assert bootstrap_ratio([1, 0, 1, 1], [1, 0, 1, 1]) == (1.0, 1.0)
    with pytest.raises(ValueError, match="denominator"):
        bootstrap_ratio([1.0], [0.0])


def test_recentred_interval_lies_around_the_estimate():
    data = np.random.default_rng(0).normal(size=50)
    low, high = recentred_bootstrap(lambda drawn: float(data[drawn].var()), 50, float(data.var()))
    assert low < data.var() < high
