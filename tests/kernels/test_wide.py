"""Weights of rows of scores equal the formula in float64: the operator, the kernel, and on a card."""

from __future__ import annotations

import pytest
import torch
from scale_dit_kernels.wide import weigh
from torch import Tensor

SCALE = 512**-0.5


def weights(scores: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Weights and their sums in float64."""
    found = ((scores.double() - scores.double().amax(1, keepdim=True)) * scale).exp()
    return found, found.sum(1)


def test_the_formula_is_a_softmax():
    scores = 30 * torch.randn(3, 40)
    found, sums = weigh(scores, SCALE, torch.float32)
    torch.testing.assert_close((found / sums[:, None]), (scores * SCALE).softmax(1), rtol=1e-5, atol=1e-7)


def test_the_operator_keeps_the_rules_of_torch():
    found = torch.library.opcheck(weigh, (torch.randn(3, 8), SCALE, torch.bfloat16))
    assert set(found.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("scores", "told"),
    [(torch.zeros(2, 3, dtype=torch.bfloat16), "bfloat16"), (torch.zeros(3, 2).T, "contiguous"),
     (torch.zeros(2, 0), r"\(2, 0\)")],
)  # fmt: skip
def test_scores_that_cannot_be_are_refused(scores, told):
    with pytest.raises(ValueError, match=told):
        weigh(scores, 1.0, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns"), [(300, 1000), (64, 40970)])
def test_the_kernel_equals_float64_on_a_card(rows, columns, dtype):
    scores = 400 * torch.randn(rows, columns, device="cuda")
    found, sums = weigh(scores, SCALE, dtype)
    wanted, totals = weights(scores, SCALE)
    assert (found.double() - wanted).abs().max() < torch.finfo(dtype).eps
    torch.testing.assert_close(sums.double(), totals, rtol=1e-5, atol=0)
