"""What a layer of attention asks of a card at least, and what a measured time says beside that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from scale_dit.benchmark.timing import Times, copy_rate, gemm_rate, percentiles
from scale_dit.layout import Layout

NUMBER, LOG_SUM = 2, 4
"""Bytes of a bfloat16, and of a row's log-sum-exp."""
BACKWARD = 2.5
"""Arithmetic of the backward pass by that of the forward pass: five products instead of two."""


@dataclass(frozen=True)
class Card:
    """Rates of a card, measured."""

    flops: float
    """FLOP/s of a large bfloat16 matrix product."""
    bytes: float
    """Bytes/s that a copy reads and writes."""

    @classmethod
    def measured(cls) -> Card:
        """Those of the current GPU."""
        return cls(gemm_rate(), copy_rate())


class Work(NamedTuple):
    """Arithmetic of a layer, and the bytes that must move through memory if all else stays in caches."""

    flops: float
    bytes: float

    def least_ms(self, card: Card) -> float:
        """The roofline: no kernel on this card is faster."""
        return 1000 * max(self.flops / card.flops, self.bytes / card.bytes)


def work_of(layout: Layout, heads: int, head_dim: int, is_dense: bool, with_gradients: bool) -> Work:
    """Work of one sample, with the layout or with dense attention of its text and image.

    Forward, queries, keys and values of all streams are read once, outputs and log-sum-exps written once. Backward,
    these five and the outputs' gradients are read, and the gradients of queries, keys and values written.
    """
    rows = layout.text + layout.image.tokens
    keys = rows if is_dense else rows + layout.guidance_tokens
    flops = 4 * rows**2 * heads * head_dim if is_dense else layout.flops(heads, head_dim)
    moved = heads * (NUMBER * head_dim * 2 * (rows + keys) + LOG_SUM * rows)
    if not with_gradients:
        return Work(flops, moved)
    return Work((1 + BACKWARD) * flops, moved + heads * (NUMBER * head_dim * 4 * (rows + keys) + LOG_SUM * rows))


def measures(times: Times, work: Work, card: Card) -> dict[str, object]:
    """A row's measures: times, rates, and what the card could do at best."""
    found = percentiles(times)
    rate = work.flops / float(found["p50_ms"]) * 1e3
    return found | {
        "tflop": f"{work.flops / 1e12:.4f}",
        "tflops": f"{rate / 1e12:.1f}",
        "share_of_gemm": f"{rate / card.flops:.3f}",
        "least_gb": f"{work.bytes / 1e9:.3f}",
        "flop_per_byte": f"{work.flops / work.bytes:.0f}",
        "roofline_ms": f"{work.least_ms(card):.4f}",
        "gemm_tflops": f"{card.flops / 1e12:.0f}",
        "copy_gb_per_s": f"{card.bytes / 1e9:.0f}",
        "rounds": len(times.device),
    }
