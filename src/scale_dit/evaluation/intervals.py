"""Intervals over pictures: Wilson for shares, bootstrap for everything else. All are 95 % and deterministic."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

Z_95 = 1.959963984540054


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Interval of a share, Wilson (1927), eq. for the score interval; sound for small n and shares of 0 and 1.

    Raises:
        ValueError: n is not positive or successes lie outside [0, n].
    """
    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"a share needs 0 <= successes <= n and n > 0, got {successes} of {n}")
    share = successes / n
    centre = share + Z_95**2 / (2 * n)
    spread = Z_95 * np.sqrt(share * (1 - share) / n + Z_95**2 / (4 * n**2))
    scale = 1 + Z_95**2 / n
    return max(0.0, float((centre - spread) / scale)), min(1.0, float((centre + spread) / scale))


def bootstrap_mean(values: Sequence[float], resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Percentile interval of the mean of `values`, drawing pictures with replacement (Efron 1979)."""
    data = np.asarray(values, dtype=np.float64)
    means = data[_draws(len(data), resamples, seed)].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def bootstrap_ratio(
    above: Sequence[float], below: Sequence[float], resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of mean(above) / mean(below) for paired values; resamples with mean(below) = 0 are left out.

    Raises:
        ValueError: the sequences differ in length, or `below` is zero throughout.
    """
    if len(above) != len(below):
        raise ValueError(f"paired values need equal lengths, got {len(above)} and {len(below)}")
    draws = _draws(len(above), resamples, seed)
    top = np.asarray(above, dtype=np.float64)[draws].mean(axis=1)
    bottom = np.asarray(below, dtype=np.float64)[draws].mean(axis=1)
    if not bottom.any():
        raise ValueError("a ratio needs a denominator that is not zero throughout")
    low, high = np.percentile(top[bottom > 0] / bottom[bottom > 0], [2.5, 97.5])
    return float(low), float(high)


def paired_difference(
    method: Mapping[int, float], baseline: Mapping[int, float]
) -> tuple[float, float, float, int] | None:
    """(mean, low, high, n) of method minus baseline over the pictures that both have; None if they share none."""
    shared = sorted(set(method) & set(baseline))
    if not shared:
        return None
    differences = [method[index] - baseline[index] for index in shared]
    low, high = bootstrap_mean(differences)
    return float(np.mean(differences)), low, high, len(shared)


def recentred_bootstrap(
    statistic: Callable[[np.ndarray], float], n: int, value: float, resamples: int = 200, seed: int = 0
) -> tuple[float, float]:
    """Interval of a statistic of a whole set of pictures, such as a Fréchet distance.

    `statistic` receives the picture indices of a resample. Repeated pictures bias such statistics (fewer distinct
    pictures look further away), so the resamples' spread about their own median is laid around the estimate `value`.
    """
    drawn = np.asarray([statistic(indices) for indices in _draws(n, resamples, seed)])
    low, middle, high = np.percentile(drawn, [2.5, 50, 97.5])
    return float(value + low - middle), float(value + high - middle)


def _draws(n: int, resamples: int, seed: int) -> np.ndarray:
    if n == 0:
        raise ValueError("an interval needs at least one picture")
    return np.random.default_rng(seed).integers(0, n, size=(resamples, n))
