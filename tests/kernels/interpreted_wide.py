"""The kernel for wide heads in Triton's interpreter against the formula in float64."""

from __future__ import annotations

import torch
from scale_dit_kernels import wide_kernels
from scale_dit_kernels.wide import weigh
from test_wide import weights

torch.utils.deterministic.fill_uninitialized_memory = True  # with NaN: what a kernel leaves out is found
torch.use_deterministic_algorithms(True)

SCALE = 0.2


def main() -> None:
    wide_kernels.BLOCK = 16
    for rows, columns in ((1, 1), (3, 16), (5, 50)):
        scores = 30 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(columns))
        for ours, right in zip(weigh(scores, SCALE, torch.float32), weights(scores, SCALE), strict=True):
            torch.testing.assert_close(ours.double(), right, rtol=1e-5, atol=1e-6)
