"""Timing on a GPU: calls that take turns, and what a row of a benchmark's table says of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from scale_dit.errors import UserError

SHORTEST_WAIT, LONGEST_WAIT = 1.0, 32.0
"""Milliseconds that the GPU is kept busy while a call is launched."""
LONG = 20.0
"""Seconds of a call from which on what the first one takes beside does not count."""
CYCLES_A_MS = 2e6
"""Clock cycles in a millisecond, at least: no card's clock is much faster."""


@dataclass
class Times:
    """What a call took, run by run, in ms."""

    device: list[float] = field(default_factory=list)
    """From the call's first kernel to the end of its last, on the GPU."""
    host: list[float] = field(default_factory=list)
    """Until the call had returned to Python, its kernels launched."""


def need_gpu() -> None:
    """Refuse a machine without a CUDA GPU.

    Raises:
        UserError: there is none.
    """
    if not torch.cuda.is_available():
        raise UserError("the benchmark needs a CUDA GPU, and this machine has none")


def interleaved(
    calls: dict[str, Callable[[], object]], rounds: int, longest_seconds: float = float("inf")
) -> dict[str, Times]:
    """Times of every call, which take turns, so that clocks and heat are alike; caches are flushed between.

    The GPU is busy with something else while a call is launched, so that its kernels wait in line and Python's time is
    not in theirs: the wait grows until the GPU gets to the call only after all of it is launched. (A call that waits
    for the GPU itself never gets there; its idle GPU is then part of what it costs.)

    A call of which all timed runs together took longer than `longest_seconds` runs no more.
    """
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")
    times = {name: Times() for name in calls}
    waits = dict.fromkeys(calls, SHORTEST_WAIT)
    for number in range(rounds + 1):
        for name, call in calls.items():
            if sum(times[name].device) > 1000 * longest_seconds:
                continue
            while True:
                device, host, was_in_time = _run(call, flush, waits[name])
                if was_in_time or waits[name] >= LONGEST_WAIT:
                    break
                waits[name] *= 2
            if number:  # the first round warms up
                times[name].device.append(device)
                times[name].host.append(host)
    return times


def _run(call: Callable[[], object], flush: Tensor, wait: float) -> tuple[float, float, bool]:
    """Device and host time of one call in ms, and whether it was launched before the GPU got to it."""
    flush.zero_()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(int(wait * CYCLES_A_MS))
    start.record()
    began = time.perf_counter()
    call()
    host = time.perf_counter() - began
    end.record()
    was_in_time = not start.query()
    end.synchronize()
    return start.elapsed_time(end), 1000 * host, was_in_time


def peak_and_seconds(code: Callable[[], object], compiled: bool = False) -> tuple[float, float]:
    """GB that torch's allocator handed out at most, and seconds until the GPU was done.

    Of a second call: the first one loads, tunes and compiles kernels. A first call above `LONG` seconds is also the
    last one, unless `compiled`.
    """
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        code()
        torch.cuda.synchronize()
        if (seconds := time.perf_counter() - began) > LONG and not compiled:
            break
    return torch.cuda.max_memory_allocated() / 1e9, seconds


def median(values: Sequence[float]) -> float:
    """The 50th percentile."""
    return torch.tensor(values, dtype=torch.float64).quantile(0.5).item()


def percentiles(times: Times) -> dict[str, str]:
    """20th, 50th and 80th percentile of the time on the GPU, and the median time of the launch, ms."""
    low, middle, high = torch.tensor(times.device).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return {
        "p20_ms": f"{low:.4f}", "p50_ms": f"{middle:.4f}", "p80_ms": f"{high:.4f}",
        "host_ms": f"{median(times.host):.4f}",
    }  # fmt: skip


def gemm_rate(side: int = 8192) -> float:
    """FLOP/s of a bfloat16 matrix product of this card, median of 20."""
    left, right = (torch.randn(side, side, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / _median_seconds(lambda: left @ right)


def copy_rate(size: int = 2**30) -> float:
    """Bytes/s that this card reads and writes when it copies `size` bytes, median of 20."""
    source, target = (torch.empty(size, dtype=torch.int8, device="cuda") for _ in range(2))
    return 2 * size / _median_seconds(lambda: target.copy_(source))


def _median_seconds(call: Callable[[], object]) -> float:
    return median(interleaved({"call": call}, 20)["call"].device) / 1000
