"""The middle attention layer of an autoencoder: one wide head over all latent pixels, 1.05 million at 8192 px."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
"""Kernels that never hold all scores at once."""
SCORE_BYTES = 2**30
"""Scores that are held at a time, in float32; their exponentials and these in the values' dtype come on top."""


def attend_all(query: Tensor, key: Tensor, value: Tensor, score_bytes: int = SCORE_BYTES) -> Tensor:
    """Attention of queries `[1, H, Q, D]` over keys `[1, H, N, D]`; scores are held for a few rows at a time.

    On GPUs in 16 bit by two matrix products with the softmax in float32 between them: torch's fused kernels for heads
    wider than 256 are several times slower than that.
    """
    if query.device.type == "cpu" or query.dtype == torch.float32:
        with sdpa_kernel(FUSED) if query.device.type == "cuda" else nullcontext():
            return functional.scaled_dot_product_attention(query, key, value)
    rows = max(1, score_bytes // (4 * key.shape[2]))
    heads = [
        torch.cat([_rows(part, *each[1:]) for part in each[0].split(rows)])
        for each in zip(query[0], key[0], value[0], strict=True)
    ]
    return torch.stack(heads)[None]


def _rows(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = torch.mm(query, key.T, out_dtype=torch.float32).mul_(query.shape[-1] ** -0.5)
    return torch.mm(scores.softmax(-1).to(value.dtype), value)
