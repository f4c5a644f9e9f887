"""The middle attention layer of an autoencoder: one wide head over all latent pixels, 1.05 million at 8192 px.

At that size the two matrix products are 2.3 PFLOP, and all scores in float32 4.4 TB: what is done with scores between
the products decides how long it takes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from scale_dit_kernels.device import HAS_TRITON
from scale_dit_kernels.wide import weigh
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
"""Kernels that never hold all scores at once."""
SCORE_BYTES = 2**30
"""Scores that are held at a time, in float32; what is made of them comes on top, see `HELD`."""


def _softmax(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Scores are read or written seven times."""
    scores = torch.mm(query, key.T, out_dtype=torch.float32).mul_(query.shape[-1] ** -0.5)
    return torch.mm(scores.softmax(-1).to(value.dtype), value)


def _weighed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Scores are written once and read twice."""
    scores = torch.mm(query, key.T, out_dtype=torch.float32)
    weights, sums = weigh(scores, query.shape[-1] ** -0.5, value.dtype)
    del scores
    return (torch.mm(weights, value, out_dtype=torch.float32) / sums[:, None]).to(value.dtype)


ROWS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"softmax": _softmax, "weighed": _weighed}
"""Ways that hold the scores of some rows: attention of queries `[Q, D]` over keys and values `[N, D]`."""
WAYS = ("torch", *ROWS)
"""`torch`'s own attention; matrix products with torch's softmax or the project's kernel between them."""
HELD = {"torch": 0.0, "weighed": 1.5, "softmax": 2.5}
"""Bytes at the peak for each byte of scores in float32."""


def way_on(device: torch.device, dtype: torch.dtype) -> str:
    """The fastest way on a device, by `python src/benchmark.py kernel=wide_attention`.

    On GPUs torch's own attention is several times slower than matrix products above a width of 256.
    """
    if device.type == "cpu" or dtype == torch.float32:
        return "torch"
    return "weighed" if device.type == "cuda" and HAS_TRITON else "softmax"


def attend_all(
    query: Tensor, key: Tensor, value: Tensor, score_bytes: int = SCORE_BYTES, way: str | None = None
) -> Tensor:
    """Attention of queries `[1, H, Q, D]` over keys `[1, H, N, D]`.

    Args:
        score_bytes: Of scores that are held at a time, where they are held.
        way: One of `WAYS`; by default that of `way_on`.
    """
    way = way or way_on(query.device, query.dtype)
    if way == "torch":
        with sdpa_kernel(FUSED) if query.device.type == "cuda" else nullcontext():
            return functional.scaled_dot_product_attention(query, key, value)
    rows = max(1, score_bytes // (4 * key.shape[2]))
    heads = [
        torch.cat([ROWS[way](part, *each[1:]) for part in each[0].split(rows)])
        for each in zip(query[0], key[0], value[0], strict=True)
    ]
    return torch.stack(heads)[None]
