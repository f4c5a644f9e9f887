"""The definition of masked attention, in float64: the oracle of every kernel."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(scale Q K^T) V over the keys that each row may read, by the textbook.

    Rows that may read nothing give output 0 and log-sum-exp -inf.

    Args:
        query: `[B, S, H, D]`.
        key: `[B, K, H, D]`.
        value: `[B, K, H, D]`.
        mask: bool `[S, K]`, true where a row reads a key.
        scale: factor of the logits, `D ** -0.5` by default.

    Returns:
        The output `[B, S, H, D]` and the natural log-sum-exp of each row's logits `[B, S, H]`, both float64.
    """
    weights, log_sum = _weights(query.double(), key.double(), mask, query.shape[-1] ** -0.5 if scale is None else scale)
    return torch.einsum("bshk,bkhd->bshd", weights, value.double()), log_sum


def _weights(query: Tensor, key: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    logits = torch.einsum("bshd,bkhd->bshk", query, key) * scale
    # Rows that may read nothing keep their logits and lose their weights: no inf - inf, forward or backward.
    empty = ~mask.any(-1)
    logits = logits.masked_fill(~(mask | empty[:, None])[None, :, None, :], -torch.inf)
    weights = logits.softmax(-1).masked_fill(empty[None, :, None, None], 0.0)
    return weights, logits.logsumexp(-1).masked_fill(empty[None, :, None], -torch.inf)


def masked_attention_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `masked_attention`'s query, key and value, float64, from that of its output `[B, S, H, D]`.

    Written out, for places where autograd does not record, such as inside an operator of torch.
    """
    query, key, value, gradient = (part.double() for part in (query, key, value, gradient))
    weights, _ = _weights(query, key, mask, scale)
    by_weight = torch.einsum("bshd,bkhd->bshk", gradient, value)
    by_logit = weights * (by_weight - (weights * by_weight).sum(-1, keepdim=True)) * scale
    return (
        torch.einsum("bshk,bkhd->bshd", by_logit, key),
        torch.einsum("bshk,bshd->bkhd", by_logit, query),
        torch.einsum("bshk,bshd->bkhd", weights, gradient),
    )
