"""The kernels of norm and rotation in Triton's interpreter against the formula in float64."""

from __future__ import annotations

import torch
from scale_dit_kernels.rotation import norm_rotate
from test_rotation import expected, inputs

torch.utils.deterministic.fill_uninitialized_memory = True
torch.use_deterministic_algorithms(True)


def main() -> None:
    for shape in ((2, 7, 3, 16), (1, 33, 2, 64), (2, 0, 3, 16)):
        tensor, weight, cosine, sine, gradient = inputs(*shape)
        single = [part.detach().float().requires_grad_() for part in (tensor, weight)]
        output = norm_rotate(*single, cosine.float(), sine.float(), 1e-6)
        actual = [output, *torch.autograd.grad(output, single, gradient.float())]
        for ours, right in zip(actual, expected(tensor, weight, cosine, sine, gradient), strict=True):
            torch.testing.assert_close(ours.double(), right, rtol=1e-5, atol=1e-5)
