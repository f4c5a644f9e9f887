"""The kernels in Triton's interpreter against the float64 reference: python interpreted.py

A program of its own, because the interpreter must be chosen before Triton is imported. In float32: the interpreter's
bfloat16 is wrong.
"""

from __future__ import annotations

import dataclasses
import os

os.environ["TRITON_INTERPRET"] = "1"

import interpreted_rotation
import interpreted_wide
import torch
from scale_dit_kernels import attention as kernels
from test_attention import LAYOUTS, output_and_gradients, random_inputs

from scale_dit.attention import triton
from scale_dit.grid import Grid

torch.utils.deterministic.fill_uninitialized_memory = True  # with NaN: what a kernel leaves out is found
torch.use_deterministic_algorithms(True)

SCALE = 0.2
SQUARE, RAGGED = (LAYOUTS[name] for name in ("square", "ragged"))
CASES = {
    "whole lists": (dataclasses.replace(SQUARE, image=Grid(12, 8, 4), guidance=Grid(8, 4, 4)), 128),
    "split lists": (dataclasses.replace(RAGGED, image=Grid(5, 14, 4), guidance=Grid(3, 5, 4)), 3),
}
"""A layout, and the longest list of tiles that one program walks. Small, since every visit of a tile costs: but every
stream reads every other in whole and in masked tiles, and every window that `RAGGED` has along its longer side is here
too: cut off at the start, whole, and cut off at the end."""
ROUNDING = 5e-5
"""Of logits up to 250 in float32, whose last digit is worth 1.5e-5; how exp2 rounds differs between processors."""


def attention() -> None:
    kernels.TILES[4] = ((16, 16), (16, 32))
    for name, (layout, triton.LONGEST) in CASES.items():
        inputs = random_inputs(layout, torch.float32, sharpness=8.0, head_dim=16)
        wanted, plain = (output_and_gradients(inputs, layout, each, SCALE) for each in ("reference", "sdpa"))
        triton.PARTS = 10**6
        actual = output_and_gradients(inputs, layout, "triton", SCALE)
        for part, (ours, torchs, right) in enumerate(zip(actual, plain, wanted, strict=True)):
            error, allowed = relative_error(ours, right), 2 * relative_error(torchs, right) + ROUNDING
            assert error < allowed, f"{name}, tensor {part}: relative error {error:.1e}"


def relative_error(actual: torch.Tensor, right: torch.Tensor) -> float:
    """Largest difference, as a share of the largest number."""
    return float((actual - right).abs().max() / right.abs().max().clamp_min(1e-6)) if right.numel() else 0.0


if __name__ == "__main__":
    attention()
    interpreted_rotation.main()
    interpreted_wide.main()
