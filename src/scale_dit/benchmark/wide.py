"""Times of the autoencoder's attention, one head of 512 over all latent pixels: ways to have it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from scale_dit.autoencoder.attention import attend_all
from scale_dit.benchmark.rotation import relative_error
from scale_dit.benchmark.timing import interleaved, need_gpu, percentiles
from scale_dit.errors import UserError
from scale_dit.evaluation.studies import add_rows

TOLERANCE = 2e-2
KEYS = ("px", "implementation")
PIXEL = 8
"""Pixels of the picture along a side of one latent pixel."""
CHECKED = 64
"""Queries whose results are compared with float64."""


@dataclass
class WideAttentionBenchmark:
    """See `configs/kernel/wide_attention.yaml` for the meaning of the fields."""

    sizes: Sequence[int]
    ways: Sequence[str]
    rounds: int
    queries: int
    width: int

    def run(self, table: Path) -> None:
        """Time every size and add rows to a table; `picture_s` is what all queries of a picture would take.

        Raises:
            UserError: there is no CUDA GPU, or results differ from float64 by more than bfloat16 rounds.
        """
        need_gpu()
        generator = torch.Generator("cuda").manual_seed(0)
        for px in self.sizes:
            pixels = (px // PIXEL) ** 2
            query, key, value = (
                torch.randn(count, self.width, generator=generator, device="cuda", dtype=torch.bfloat16)
                for count in (min(self.queries, pixels), pixels, pixels)
            )
            calls: dict[str, Callable[[], object]] = {}
            for way in self.ways:
                code = partial(_by_way, way=way)
                check(way, code, query, key, value)
                calls[way] = partial(code, query, key, value)
            for name, found in interleaved(calls, self.rounds).items():
                times = percentiles(found)
                seconds = float(times["p50_ms"]) / 1000
                row = {"px": px, "implementation": name} | times
                row |= {
                    "tflops": f"{4 * query.numel() * pixels / seconds / 1e12:.0f}",
                    "picture_s": f"{seconds * pixels / len(query):.3f}", "rounds": self.rounds,
                }  # fmt: skip
                print(*row.values(), flush=True)
                add_rows(table, [row], KEYS)


def _by_way(query: Tensor, key: Tensor, value: Tensor, way: str) -> Tensor:
    return attend_all(query[None, None], key[None, None], value[None, None], way=way)[0, 0]


def check(name: str, code: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor) -> None:
    """Hold an implementation's last rows against float64.

    Raises:
        UserError: they differ by more than bfloat16 rounds.
    """
    some = query[-CHECKED:].double()
    right = (some @ key.double().T * query.shape[1] ** -0.5).softmax(-1) @ value.double()
    error = relative_error(code(query, key, value)[-CHECKED:], right)
    if not error <= TOLERANCE:
        raise UserError(f"over {len(key)} keys {name} differs from float64 by {error:.1e}: nothing is timed")
