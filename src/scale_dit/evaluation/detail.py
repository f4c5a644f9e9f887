"""Detail score: is the picture as rich in fine structure as the truth, no poorer and no richer?

Resolution alone is not detail, and neither is noise: the score compares how much power a picture has at each spatial
frequency that its draft could not carry with how much the true picture has there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from scale_dit.errors import UserError
from scale_dit.evaluation.intervals import bootstrap_mean
from scale_dit.evaluation.metric import Figure, PictureValues, Record
from scale_dit.evaluation.pictures import to_uint8

LUMINANCE_WEIGHTS = (0.299, 0.587, 0.114)
ROUNDING_VARIANCE = 1 / 12


def radial_log_power(images: Tensor) -> tuple[Tensor, Tensor]:
    """Radially averaged log power spectrum of the luminance.

    L(k) = log10(1 + P(k) / P_rounding): P is the Hann-windowed power averaged over rings one cycle per short side
    wide, P_rounding what 8-bit rounding noise (variance 1/12) has under the same window. L is 0 where there is
    nothing above rounding, and a factor of ten in power is one unit above.

    Args:
        images: `[B, 3, H, W]`, uint8 or float in [0, 1].

    Returns:
        Ring centres in cycles per pixel `[K]`, up to Nyquist (0.5), and L `[B, K]`, float64.
    """
    weights = torch.tensor(LUMINANCE_WEIGHTS, dtype=torch.float64, device=images.device)
    luminance = torch.einsum("bchw,c->bhw", to_uint8(images).double(), weights)
    height, width = luminance.shape[-2:]
    window, ring, counts, centres = (part.to(images.device) for part in _rings(height, width))
    luminance = luminance - luminance.mean(dim=(-2, -1), keepdim=True)
    power = torch.fft.rfft2(luminance * window).abs().square().flatten(1)  # [B, H * (W // 2 + 1)]
    sums = torch.zeros(len(power), len(counts), dtype=torch.float64, device=images.device)
    sums.index_add_(1, ring, power * _column_weights(height, width).to(images.device))
    mean_power = sums / counts
    rounding = ROUNDING_VARIANCE * window.square().sum()
    return centres, torch.log10(1 + mean_power[:, : len(centres)] / rounding)


def detail_score(images: Tensor, references: Tensor, scale: float) -> Tensor:
    """1 - sum_k |L_image(k) - L_true(k)| / sum_k L_true(k), over the frequencies k from the draft's Nyquist to the own.

    1 is a spectrum like the truth's, 0 one as wrong as having no fine structure at all (or worse: clipped).

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
    centres, generated = radial_log_power(images)
    _, true = radial_log_power(references)
    band = centres > 0.5 / scale
    if scale <= 1 or not band.any():
        raise UserError(f"the detail score needs a scale above 1 (picture side / draft side), got {scale}")
    error = (generated[:, band] - true[:, band]).abs().sum(dim=1)
    return (1 - error / true[:, band].sum(dim=1).clamp_min(1e-12)).clamp(0, 1)


@lru_cache(maxsize=4)
def _rings(height: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hann window `[H, W]`, ring of each rfft2 coefficient, coefficients per ring, and ring centres up to Nyquist."""
    window = torch.outer(*(torch.hann_window(n, periodic=True, dtype=torch.float64) for n in (height, width)))
    vertical = torch.fft.fftfreq(height, dtype=torch.float64)[:, None]
    horizontal = torch.fft.rfftfreq(width, dtype=torch.float64)[None, :]
    short = min(height, width)
    ring = (torch.hypot(vertical, horizontal) * short).round().long().flatten()
    counts = torch.zeros(int(ring.max()) + 1, dtype=torch.float64)
    counts.index_add_(0, ring, _column_weights(height, width))
    centres = torch.arange(short // 2 + 1, dtype=torch.float64) / short
    return window, ring, counts, centres


@lru_cache(maxsize=4)
def _column_weights(height: int, width: int) -> Tensor:
    """How often each rfft2 coefficient occurs in the full spectrum: inner columns stand for their mirror image too."""
    weights = torch.full((height, width // 2 + 1), 2.0, dtype=torch.float64)
    weights[:, 0] = 1
    if width % 2 == 0:
        weights[:, -1] = 1
    return weights.flatten()


class Detail:
    """Mean detail score of an arm against the true renders.

    Args:
        scale: picture side over draft side.
        name: of the figure.
    """

    def __init__(self, scale: float, name: str = "detail") -> None:
        if scale <= 1:
            raise UserError(f"the detail score needs a scale above 1 (picture side / draft side), got {scale}")
        self.scale = scale
        self.name = name
        self._values = PictureValues()

    @property
    def needs(self) -> tuple[str, ...]:
        return ("true pictures of the prompts",)

    def available(self) -> str | None:
        return None

    def update(self, arm: str, images: Tensor, prompts: Sequence[str], records: Sequence[Record]) -> None:
        known = [i for i, record in enumerate(records) if record.reference is not None]
        if not known:
            return
        references = torch.stack([records[i].reference for i in known])
        for i, score in zip(known, detail_score(images[known], references, self.scale).tolist(), strict=True):
            self._values.add(arm, self.name, records[i].index, score)

    def compute(self, arm: str) -> dict[str, Figure]:
        scores = list(self._values.of(arm).get(self.name, {}).values())
        if not scores:
            return {}
        low, high = bootstrap_mean(scores)
        note = f"spectrum above 1/{2 * self.scale:g} cycles per pixel, Hann window, against the true render"
        return {self.name: Figure(float(np.mean(scores)), low, high, len(scores), "", note)}

    def per_picture(self, arm: str) -> dict[str, Mapping[int, float]]:
        return dict(self._values.of(arm))
