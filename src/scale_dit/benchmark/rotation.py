"""Times of norm and rotation: what one pass over memory saves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

from scale_dit.benchmark.attention import TOKEN_PX
from scale_dit.benchmark.timing import interleaved, need_gpu, percentiles
from scale_dit.errors import UserError
from scale_dit.evaluation.studies import add_rows
from scale_dit.models.flux_attention import norm_and_rotate

TOLERANCE = 1e-2
KEYS = ("px", "implementation", "pass")


@dataclass
class RotationBenchmark:
    """See `configs/kernel/norm_rotate.yaml` for the meaning of the fields."""

    sizes: Sequence[int]
    passes: Sequence[str]
    rounds: int
    heads: int
    head_dim: int
    text: int

    def run(self, table: Path) -> None:
        """Time every size and add rows to a table.

        `gb_per_s` counts a read and a write of the tensor, and two reads and a write in the backward pass.

        Raises:
            UserError: there is no CUDA GPU, or the outputs differ by more than bfloat16 rounds.
        """
        need_gpu()
        norm = nn.RMSNorm(self.head_dim, eps=1e-6, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
        compiled = torch.compile(norm_and_rotate, dynamic=False)
        for px, kind in product(self.sizes, self.passes):
            tokens = self.text + (px // TOKEN_PX) ** 2
            query = torch.randn(1, tokens, self.heads, self.head_dim, device="cuda", dtype=torch.bfloat16)
            angles = torch.randn(tokens, self.head_dim // 2, device="cuda").repeat_interleave(2, dim=1)
            rotary = (angles.cos(), angles.sin())
            implementations = {
                "fused": partial(norm_and_rotate, norm=norm, rotary=rotary, fused=True),
                "eager": partial(norm_and_rotate, norm=norm, rotary=rotary, fused=False),
                "compiled": partial(compiled, norm=norm, rotary=rotary, fused=False),
            }
            if (
                not (error := relative_error(*(implementations[name](query) for name in ("fused", "eager"))))
                <= TOLERANCE
            ):
                raise UserError(
                    f"at {px} px the fused pass differs from the two passes by {error:.1e}: nothing is timed"
                )
            calls = {name: _call(make, query, kind) for name, make in implementations.items()}
            with torch._dynamo.config.patch(recompile_limit=64):  # beyond it `compiled` would silently be eager
                measured = interleaved(calls, self.rounds)
            for name, found in measured.items():
                times = percentiles(found)
                moved = query.numel() * 2 * (2 if kind == "forward" else 5)
                row = dict(zip(KEYS, (px, name, kind), strict=True)) | times
                row |= {"gb_per_s": f"{moved / float(times['p50_ms']) / 1e6:.0f}", "rounds": self.rounds}
                print(*row.values(), flush=True)
                add_rows(table, [row], KEYS)


def relative_error(actual: Tensor, right: Tensor) -> float:
    """Of the whole tensor, by its norm."""
    return float((actual.double() - right.double()).norm() / right.double().norm())


def _call(make: Callable[[Tensor], Tensor], query: Tensor, kind: str) -> Callable[[], object]:
    if kind == "forward":
        return torch.no_grad()(lambda: make(query))
    leaf = query.detach().requires_grad_()
    gradient = torch.randn_like(query)
    return lambda: torch.autograd.grad(make(leaf), leaf, gradient)
