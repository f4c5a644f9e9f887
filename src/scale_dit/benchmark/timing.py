"""Timing on a GPU: calls that take turns, and what a row of a benchmark's table says of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from scale_dit.errors import UserError


def need_gpu() -> None:
    """Refuse a machine without a CUDA GPU.

    Raises:
        UserError: there is none.
    """
    if not torch.cuda.is_available():
        raise UserError("the benchmark needs a CUDA GPU, and this machine has none")


def interleaved(
    calls: dict[str, Callable[[], object]], rounds: int, longest_seconds: float = float("inf")
) -> dict[str, list[float]]:
    """Milliseconds of every call, which take turns, so that clocks and heat are alike; caches are flushed between.

    A call whose first run is longer than `longest_seconds` runs no more.
    """
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            if times[name] and times[name][0] > 1000 * longest_seconds:
                continue
            flush.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            if number:  # the first round warms up
                times[name].append(start.elapsed_time(end))
    return times


def percentiles(milliseconds: Sequence[float]) -> dict[str, str]:
    """20th, 50th and 80th percentile, ms."""
    low, middle, high = torch.tensor(milliseconds).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return {"p20_ms": f"{low:.4f}", "p50_ms": f"{middle:.4f}", "p80_ms": f"{high:.4f}"}


def gemm_rate(side: int = 8192) -> float:
    """FLOP/s of a bfloat16 matrix product of this card, median of 20."""
    left, right = (torch.randn(side, side, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = interleaved({"product": lambda: left @ right}, 20)["product"]
    return 2 * side**3 / torch.tensor(times).median().item() * 1e3
