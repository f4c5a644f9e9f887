"""The kernels in Triton's interpreter against the float64 reference: python interpreted.py LAYOUT ...

A program of its own, because the interpreter must be chosen before Triton is imported. In float32: the interpreter's
bfloat16 is wrong.
"""

from __future__ import annotations

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch
from scale_dit_kernels import attention as kernels
from test_attention import LAYOUTS, output_and_gradients, random_inputs

from scale_dit.attention import triton

torch.utils.deterministic.fill_uninitialized_memory = True  # with NaN: what a kernel leaves out is found
torch.use_deterministic_algorithms(True)

SCALE = 0.2
LONGEST = {"square": 128}
"""Longest list of tiles that one program walks: whole lists, and elsewhere split ones."""
ROUNDING = 5e-5
"""Of logits up to 250 in float32, whose last digit is worth 1.5e-5; how exp2 rounds differs between processors."""


def main() -> None:
    kernels.TILES[4] = ((16, 16), (16, 32))
    for name in sys.argv[1:]:
        inputs = random_inputs(LAYOUTS[name], torch.float32, sharpness=8.0, head_dim=16)
        wanted, plain = (output_and_gradients(inputs, LAYOUTS[name], each, SCALE) for each in ("reference", "sdpa"))
        triton.LONGEST, triton.PARTS = LONGEST.get(name, 3), 10**6
        actual = output_and_gradients(inputs, LAYOUTS[name], "triton", SCALE)
        for part, (ours, torchs, right) in enumerate(zip(actual, plain, wanted, strict=True)):
            error, allowed = relative_error(ours, right), 2 * relative_error(torchs, right) + ROUNDING
            assert error < allowed, f"{name}, lists up to {triton.LONGEST}, tensor {part}: relative error {error:.1e}"


def relative_error(actual: torch.Tensor, right: torch.Tensor) -> float:
    """Largest difference, as a share of the largest number."""
    return float((actual - right).abs().max() / right.abs().max().clamp_min(1e-6)) if right.numel() else 0.0


if __name__ == "__main__":
    main()
