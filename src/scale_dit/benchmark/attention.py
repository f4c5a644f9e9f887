"""Times of one attention layer, sparse and dense, in one run and interleaved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from scale_dit.attention import attend, backends
from scale_dit.benchmark.exact import text_rows, window_rows
from scale_dit.benchmark.timing import gemm_rate, interleaved, need_gpu, percentiles
from scale_dit.errors import UserError
from scale_dit.evaluation.studies import add_rows
from scale_dit.grid import Grid
from scale_dit.layout import Layout

HALOS = {"disjoint": 0, "official": 8}
DENSE = {"dense_cudnn": SDPBackend.CUDNN_ATTENTION, "dense_flash": SDPBackend.FLASH_ATTENTION}
TOKEN_PX, CELL, WINDOW, SCALE = 16, 8, 16, 4
TOLERANCE = 6e-3
"""Relative error of bfloat16 attention against float64 that passes the gate."""
KEYS = ("px", "pattern", "order", "backend", "pass")


@dataclass
class Case:
    """One layer: streams and who reads whom."""

    layout: Layout
    text: tuple[Tensor, Tensor, Tensor]
    image: tuple[Tensor, Tensor, Tensor]
    guidance: tuple[Tensor, Tensor]

    def run(self, backend: str, with_gradients: bool) -> tuple[Tensor, Tensor]:
        """One call; with gradients of everything that goes in."""
        outputs = self._dense(DENSE[backend]) if backend in DENSE else self._sparse(backend)
        if with_gradients:
            leaves = [*self.text, *self.image, *(() if backend in DENSE else self.guidance)]
            torch.autograd.grad(outputs, leaves, outputs)
        return outputs

    def _sparse(self, backend: str) -> tuple[Tensor, Tensor]:
        return attend(self.text, self.image, self.guidance, self.layout, backend)

    def _dense(self, kernel: SDPBackend) -> tuple[Tensor, Tensor]:
        query, key, value = (torch.cat(pair, dim=1).transpose(1, 2) for pair in zip(self.text, self.image, strict=True))
        with sdpa_kernel(kernel):
            output = scaled_dot_product_attention(query, key, value).transpose(1, 2)
        text_out, image_out = output.split([self.layout.text, self.layout.image.tokens], dim=1)
        return text_out, image_out


@dataclass
class AttentionBenchmark:
    """See `configs/kernel/attention.yaml` for the meaning of the fields.

    Raises:
        UserError: a backend, pattern or pass is unknown.
    """

    sizes: Sequence[int]
    patterns: Sequence[str]
    orders: Sequence[str]
    backends: Sequence[str]
    passes: Sequence[str]
    rounds: int
    longest_seconds: float
    heads: int
    head_dim: int
    text: int

    def __post_init__(self) -> None:
        for given, allowed, name in (
            (self.backends, [*backends(), *DENSE], "backend"),
            (self.patterns, list(HALOS), "pattern"),
            (self.passes, ["forward", "forward_backward"], "pass"),
        ):
            if unknown := [each for each in given if each not in allowed]:
                raise UserError(f"unknown {name} '{unknown[0]}': use one of {', '.join(allowed)}")

    def run(self, table: Path) -> None:
        """Check and time every case, and add rows to a table as they are measured.

        Raises:
            UserError: there is no CUDA GPU.
        """
        need_gpu()
        gemm = gemm_rate()
        print(f"{torch.cuda.get_device_name()}: bf16 matrix product {gemm / 1e12:.0f} TFLOP/s", flush=True)
        too_long: set[tuple[str, str]] = set()
        for px, pattern, order in product(self.sizes, self.patterns, self.orders):
            case = self.case(px, pattern, order)
            for kind in self.passes:
                chosen = [each for each in self.backends if (each, kind) not in too_long]
                calls = self._ready(case, chosen, kind == "forward_backward")
                for backend, milliseconds in interleaved(calls, self.rounds, self.longest_seconds).items():
                    if milliseconds[0] > 1000 * self.longest_seconds:
                        too_long.add((backend, kind))
                    flops = self._flops(case.layout, backend) * (3.5 if kind == "forward_backward" else 1)
                    row = dict(zip(KEYS, (px, pattern, order, backend, kind), strict=True))
                    row |= measures(milliseconds, flops, gemm)
                    print(*row.values(), flush=True)
                    add_rows(table, [row], KEYS)
            del case
            torch.cuda.empty_cache()

    def case(self, px: int, pattern: str, order: str) -> Case:
        """Random streams of a picture of `px` x `px`, each stream packed as a projection would leave it."""
        side = px // TOKEN_PX
        layout = Layout(
            self.text, Grid(side, side, CELL), Grid(side // SCALE, side // SCALE, CELL),
            window=WINDOW, halo=HALOS[pattern], order=order,
        )  # fmt: skip
        generator = torch.Generator("cuda").manual_seed(0)

        def stream(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
            shape = (1, tokens, 3, self.heads, self.head_dim)
            packed = torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)
            query, key, value = (part.requires_grad_() for part in packed.unbind(2))
            return query, key, value

        return Case(layout, stream(layout.text), stream(layout.image.tokens), stream(layout.guidance_tokens)[1:])

    def _ready(self, case: Case, chosen: Sequence[str], with_gradients: bool) -> dict[str, Callable[[], object]]:
        """Calls whose outputs passed the gate and that run here, warm; why the others do not is printed."""
        calls: dict[str, Callable[[], object]] = {}
        for backend in chosen:
            call = partial(case.run, backend, with_gradients)
            try:
                with torch.set_grad_enabled(with_gradients):
                    outputs = call()
                if backend not in DENSE and not (error := gate(case, outputs)) <= TOLERANCE:
                    print(f"{backend} is wrong by {error:.1e} and is not timed", flush=True)
                    continue
            except (UserError, RuntimeError) as problem:  # out of memory is a RuntimeError
                print(f"{backend} does not run: {str(problem).splitlines()[0][:200]}", flush=True)
                torch.cuda.empty_cache()
                continue
            calls[backend] = torch.enable_grad()(call) if with_gradients else torch.no_grad()(call)
        return calls

    def _flops(self, layout: Layout, backend: str) -> float:
        if backend in DENSE:
            return 4 * (layout.text + layout.image.tokens) ** 2 * self.heads * self.head_dim
        return layout.flops(self.heads, self.head_dim)


@torch.no_grad()
def gate(case: Case, outputs: tuple[Tensor, Tensor]) -> float:
    """Largest relative error against float64, of three windows of every kind there is and of the last text rows."""
    errors = []
    for group, windows in enumerate(case.layout.groups()):
        for window in (0, len(windows.queries) // 2, -1):
            rows, right = window_rows(case.text, case.image, case.guidance, case.layout, group, window)
            errors.append((outputs[1][:, rows].double() - right).norm() / right.norm())
    right = text_rows(case.text, case.image, slice(-8, None), head=1)
    errors.append((outputs[0][:, -8:, 1:2].double() - right).norm() / right.norm())
    return float(torch.stack(errors).max())


def measures(milliseconds: Sequence[float], flops: float, gemm: float) -> dict[str, object]:
    """Percentiles, rate, and the share of the rate of a large matrix product."""
    found = percentiles(milliseconds)
    rate = flops / float(found["p50_ms"]) * 1e3
    return found | {
        "tflop": f"{flops / 1e12:.4f}", "tflops": f"{rate / 1e12:.1f}", "share_of_gemm": f"{rate / gemm:.3f}",
        "rounds": len(milliseconds),
    }  # fmt: skip
