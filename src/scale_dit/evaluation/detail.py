"""Detail score: is the picture as rich in fine structure as the truth, no poorer and no richer?

Resolution alone is not detail, and neither is noise: the score compares how much power a picture has, patch by patch,
at the spatial frequencies that its draft could not carry, with how much the true picture has there.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from scale_dit.errors import UserError
from scale_dit.evaluation.intervals import bootstrap_mean
from scale_dit.evaluation.metric import Figure, PictureMetric, Record
from scale_dit.picture_files import to_uint8

LUMINANCE_WEIGHTS = (0.299, 0.587, 0.114)
PATCH = 64
PATCHES_AT_ONCE = 2048


def radial_log_power(image: Tensor) -> tuple[Tensor, Tensor]:
    """Radially averaged log power spectrum of the luminance (0..255) of every patch.

    Patches are 64 px a side and overlap by half (Welch 1967). L(k) is the average, over the ring of spatial
    frequencies of length k, of log10(1 + P / P_level): P is the power under a Hann window, P_level what white noise of
    one grey level (standard deviation) has under the same window. L is 0 where nothing can be seen, and grows by 1 with
    every factor of ten in power. The logarithm is taken before the average, so that a few strong lines (the seams of a
    mosaic lie on the axes) do not pass for a filled spectrum.

    Args:
        image: `[3, H, W]`, uint8 or float in [0, 1].

    Returns:
        k in cycles per pixel, up to Nyquist (0.5) `[K]`, and L `[patches, K]`, float32.
    """
    weights = torch.tensor(LUMINANCE_WEIGHTS, device=image.device)
    luminance = torch.einsum("chw,c->hw", to_uint8(image).float(), weights)
    side = min(PATCH, *luminance.shape)
    window, rings, frequencies = (part.to(image.device) for part in _window_and_rings(side))
    step = max(side // 2, 1)
    patches = luminance.unfold(0, side, step).unfold(1, side, step).flatten(0, 1)
    level = window.square().sum()
    averages = []
    for some in patches.split(PATCHES_AT_ONCE):
        centred = some - some.mean(dim=(-2, -1), keepdim=True)
        power = torch.fft.rfft2(centred * window).abs().square().flatten(1)  # [patches, side * (side // 2 + 1)]
        averages.append(torch.log10(1 + power / level) @ rings)
    return frequencies, torch.cat(averages)


def detail_score(images: Tensor, references: Tensor, scale: float) -> Tensor:
    """1 - mean |L_image - L_true| / mean L_true, over the frequencies from the draft's Nyquist to the picture's own.

    At each frequency the patches of both pictures are sorted by L before they are compared: what counts is how much
    detail there is in how much of the picture, not where. (The mean distance of sorted values is the first Wasserstein
    distance.) 1 is as detailed as the truth; 0 is as wrong as having no fine structure at all, or worse.

    Args:
        images: `[B, 3, H, W]`, uint8 or float in [0, 1].
        references: the true pictures, same shape.
        scale: picture side over draft side; the draft's Nyquist frequency is 1 / (2 scale) cycles per pixel.

    Returns:
        `[B]` float64 in [0, 1].

    Raises:
        UserError: the shapes differ, or the scale leaves no frequency to compare (scale <= 1).
    """
    if images.shape != references.shape:
        raise UserError(
            f"the detail score compares pictures of one size, got {tuple(images.shape)} and the truth "
            f"{tuple(references.shape)}; render the truth at the picture's size"
        )
    _check_scale(scale)
    scores = [_score(image, reference, scale) for image, reference in zip(images, references, strict=True)]
    return torch.tensor(scores, dtype=torch.float64)


def _score(image: Tensor, reference: Tensor, scale: float) -> float:
    frequencies, made = radial_log_power(image)
    _, true = radial_log_power(reference)
    band = frequencies > 0.5 / scale
    made, true = made[:, band].sort(dim=0).values, true[:, band].sort(dim=0).values
    error = float((made - true).abs().mean() / true.mean().clamp_min(1e-6))
    return min(1.0, max(0.0, 1.0 - error))


def _check_scale(scale: float) -> None:
    if not scale > 1:
        raise UserError(f"the detail score needs a scale above 1 (picture side / draft side), got {scale}")


@lru_cache(maxsize=4)
def _window_and_rings(side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hann window `[side, side]`, the matrix that averages rfft2 coefficients over rings, their frequencies `[K]`."""
    line = torch.hann_window(side, periodic=True)
    vertical = torch.fft.fftfreq(side)[:, None]
    horizontal = torch.fft.rfftfreq(side)[None, :]
    ring = (torch.hypot(vertical, horizontal) * side).round().long()
    # Inner columns of rfft2 stand for their mirror image too.
    occurrences = torch.full_like(ring, 2, dtype=torch.float32)
    occurrences[:, 0] = 1
    if side % 2 == 0:
        occurrences[:, -1] = 1
    rings = torch.nn.functional.one_hot(ring.flatten())[:, : side // 2 + 1] * occurrences.flatten()[:, None]
    return torch.outer(line, line), rings / rings.sum(dim=0), torch.arange(side // 2 + 1) / side


class Detail(PictureMetric):
    """Mean detail score of an arm against the true renders.

    Args:
        scale: picture side over draft side.
        name: of the figure.
    """

    needs = ("true pictures of the prompts",)

    def __init__(self, scale: float, name: str = "detail") -> None:
        super().__init__()
        _check_scale(scale)
        self.scale = scale
        self.name = name

    def update(self, arm: str, images: Tensor, prompts: Sequence[str], records: Sequence[Record]) -> None:
        """Score the pictures whose records carry the true picture."""
        for image, record in zip(images, records, strict=True):
            if record.reference is not None:
                score = detail_score(image[None], record.reference[None], self.scale)
                self._add(arm, self.name, record.index, float(score))

    def compute(self, arm: str) -> dict[str, Figure]:
        """Mean score, with a bootstrap interval."""
        scores = list(self.per_picture(arm).get(self.name, {}).values())
        if not scores:
            return {}
        low, high = bootstrap_mean(scores)
        note = f"spectrum above 1/{2 * self.scale:g} cycles per pixel against the true render, {PATCH} px patches"
        return {self.name: Figure(float(np.mean(scores)), low, high, len(scores), "", note)}
