"""Attention with wide heads equals the formula in float64: the operators, the kernels, and on a card."""

from __future__ import annotations

import pytest
import torch
from scale_dit_kernels.wide import attend_wide, weigh
from torch import Tensor

SCALE = 512**-0.5


def streams(heads: int, queries: int, keys: int, width: int, device: str = "cpu") -> tuple[Tensor, ...]:
    """Query, key and value in float64, slices of wider tensors; logits from -100 to 100 or so."""
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(heads, max(queries, keys), 3, width, generator=generator, dtype=torch.float64).to(device)
    query, key, value = packed.unbind(2)
    return 4 * query[:, :queries], 4 * key[:, :keys], value[:, :keys]


def exact(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attention in float64."""
    return (scale * query @ key.transpose(1, 2)).softmax(-1) @ value


def weights(scores: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Weights and their sums in float64."""
    found = ((scores.double() - scores.double().amax(1, keepdim=True)) * scale).exp()
    return found, found.sum(1)


def test_the_formula_is_attention():
    parts = streams(2, 5, 7, 16)
    ours = attend_wide(*(part.float() for part in parts), SCALE)
    torch.testing.assert_close(ours.double(), exact(*parts, SCALE), rtol=1e-5, atol=1e-5)
    scores = 30 * torch.randn(3, 40)
    found, sums = weigh(scores, SCALE, torch.float32)
    torch.testing.assert_close((found / sums[:, None]), (scores * SCALE).softmax(1), rtol=1e-5, atol=1e-7)


def test_operators_keep_the_rules_of_torch():
    parts = tuple(part.float() for part in streams(2, 5, 7, 16))
    for operator, arguments in ((attend_wide, (*parts, SCALE)), (weigh, (torch.randn(3, 8), SCALE, torch.bfloat16))):
        assert set(torch.library.opcheck(operator, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("scores", "told"),
    [(torch.zeros(2, 3, dtype=torch.bfloat16), "bfloat16"), (torch.zeros(3, 2).T, "contiguous"),
     (torch.zeros(2, 0), r"\(2, 0\)")],
)  # fmt: skip
def test_scores_that_cannot_be_are_refused(scores, told):
    with pytest.raises(ValueError, match=told):
        weigh(scores, 1.0, torch.bfloat16)


@pytest.mark.parametrize(("keys", "width"), [(0, 16), (4, 24)])
def test_heads_that_cannot_be_are_refused(keys, width):
    with pytest.raises(ValueError, match="power of 2"):
        attend_wide(torch.zeros(1, 2, width), torch.zeros(1, keys, width), torch.zeros(1, keys, width), 1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "queries", "keys", "width"), [(1, 300, 1000, 512), (2, 64, 4097, 256)])
def test_kernels_equal_float64_on_a_card(heads, queries, keys, width, dtype):
    parts = tuple(part.to(dtype) for part in streams(heads, queries, keys, width, "cuda"))
    right = exact(*(part.double() for part in parts), SCALE)
    size = right.abs().max()
    assert ((attend_wide(*parts, SCALE).double() - right).abs().max() / size) < 4 * torch.finfo(dtype).eps
    scores = torch.mm(parts[0][0], parts[1][0].T, out_dtype=torch.float32)
    found, sums = weigh(scores, SCALE, dtype)
    wanted, totals = weights(scores, SCALE)
    assert (found.double() - wanted).abs().max() < torch.finfo(dtype).eps
    torch.testing.assert_close(sums.double(), totals, rtol=1e-5, atol=0)
