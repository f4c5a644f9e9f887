"""Measure how fast this machine is, so that `generate` can say beforehand what a picture will take.

python -m scale_dit.planning.calibrate                 into the user's cache folder, for this card and version of torch
python -m scale_dit.planning.calibrate --to src/scale_dit/planning/machines     to ship it
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn.functional import conv2d, scaled_dot_product_attention

from scale_dit.attention import attend_joined
from scale_dit.autoencoder.attention import attend_all
from scale_dit.autoencoder.planes import PIECE_BYTES
from scale_dit.device import choose_device
from scale_dit.grid import Grid
from scale_dit.layout import Layout
from scale_dit.planning.machine import Machine, cache_folder, device_name, file_name
from scale_dit.planning.practice import in_practice, thin_pipeline
from scale_dit.provenance import versions_line

log = logging.getLogger(__name__)

BATCHES = 3
BATCH_SECONDS = 0.4
MOST_CALLS = 500
SMALL_OPERATIONS = 200
PIECES = 16


def measure(device: torch.device, dtype: torch.dtype) -> Machine:
    """Measure a device: a minute on a GPU, half of one on a processor, whose sizes are smaller."""
    machine = in_practice(rates(device, dtype), thin_pipeline(device, dtype))
    if device.type != "cuda":
        return machine
    gc.collect()
    torch.cuda.empty_cache()
    return replace(machine, first_encoding=_first_encoding(device, dtype))


def _first_encoding(device: torch.device, dtype: torch.dtype) -> float:
    """`practice.first_encoding` of a process of its own; 0 where a card does not let another one in."""
    code = (
        "import torch\nfrom scale_dit.planning.practice import first_encoding\n"
        f"print(first_encoding({str(device)!r}, {dtype}))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        log.warning("how long the first prompt takes was not measured: %s", done.stderr.strip().splitlines()[-1:])
        return 0.0
    return float(done.stdout.split()[-1])


def rates(device: torch.device, dtype: torch.dtype) -> Machine:
    """How fast single operations are."""
    large = device.type == "cuda"

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    def rate(amount: float, code: Callable[[], object]) -> float:
        return amount / _seconds(code, device)

    tokens, width = (16384, 3072) if large else (2048, 512)
    left, right = random(tokens, width), random(4 * width, width)
    matmul = rate(8 * tokens * width**2, lambda: torch.nn.functional.linear(left, right))

    side, channels = (1024, 128) if large else (128, 32)
    picture, kernel = random(1, channels, side, side), random(channels, channels, 3, 3)
    convolution = rate(18 * side**2 * channels**2, lambda: conv2d(picture, kernel, padding=1))

    pinning = _pinning_rate(device)  # first of what needs pinned memory: later some would be at hand
    heads, size = (24, 128) if large else (8, 32)
    rows = 8192 if large else 1088
    query, key, value = (random(1, heads, rows, size) for _ in range(3))
    attention = rate(4 * heads * size * rows**2, lambda: scaled_dot_product_attention(query, key, value))
    windowed = _windowed_rate(rate, random, heads, size) if large else attention
    rows, keys, width = (16384, 2**18, 512) if large else (256, 4096, 512)
    query, key, value = (random(1, 1, count, width) for count in (rows, keys, keys))
    wide = rate(4 * rows * keys * width, lambda: attend_all(query, key, value))

    numbers = random(2**28 if large else 2**20)
    bandwidth = rate(2 * numbers.nbytes, lambda: numbers * 2)
    few = random(8)
    launch = _seconds(lambda: [few * 2 for _ in range(SMALL_OPERATIONS)], device) / SMALL_OPERATIONS
    return Machine(
        device_name(device), str(dtype), matmul, convolution, attention, windowed, bandwidth, launch,
        _host_copy_rate(device, rate), versions_line(), wide=wide, pinning=pinning,
    )  # fmt: skip


def _windowed_rate(
    rate: Callable[[float, Callable[[], object]], float], random: Callable[..., torch.Tensor], heads: int, size: int
) -> float:
    """FLOP/s of the attention that `auto` takes, at 4096 px on FLUX.1."""
    layout = Layout(512, Grid(256, 256, 8), Grid(64, 64, 8), window=16, halo=8)
    text, image = (
        tuple(random(1, tokens, heads, size) for _ in range(3)) for tokens in (layout.text, layout.image.tokens)
    )
    guidance = random(1, layout.guidance_tokens, heads, size), random(1, layout.guidance_tokens, heads, size)
    return rate(layout.flops(heads, size), lambda: attend_joined(text, image, guidance, layout))  # type: ignore[arg-type]


def _host_copy_rate(device: torch.device, rate: Callable[[float, Callable[[], object]], float]) -> float:
    """Bytes/s from pinned memory to a card; within a processor's memory, as fast as it copies."""
    source = torch.empty(2**28 if device.type == "cuda" else 2**24, dtype=torch.int8)
    source = source.pin_memory() if device.type == "cuda" else source
    target = torch.empty_like(source, device=device)
    return rate(source.nbytes, lambda: target.copy_(source, non_blocking=True))


def _pinning_rate(device: torch.device) -> float:
    """Bytes/s that are pinned for the first time; 0 on a processor, for which nothing is pinned."""
    if device.type != "cuda":
        return 0.0
    began = time.perf_counter()
    pieces = [torch.empty(PIECE_BYTES, dtype=torch.int8, pin_memory=True) for _ in range(PIECES)]
    return PIECES * pieces[0].nbytes / (time.perf_counter() - began)


def _seconds(code: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call among many, one after the other: of the batch that was disturbed least.

    A batch lasts long enough that a card's clocks settle as they do in a picture.
    """
    code()
    once = _batch(code, 1, device)
    calls = max(1, min(MOST_CALLS, round(BATCH_SECONDS / once)))
    return min(_batch(code, calls, device) for _ in range(BATCHES))


def _batch(code: Callable[[], object], calls: int, device: torch.device) -> float:
    """Mean seconds of so many calls."""
    _synchronise(device)
    began = time.perf_counter()
    for _ in range(calls):
        code()
    _synchronise(device)
    return (time.perf_counter() - began) / calls


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, help="file or folder; by default the user's cache folder")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    device, dtype = choose_device(options.device, options.dtype)
    machine = measure(device, dtype)
    path = options.to or cache_folder()
    path = path if path.suffix == ".json" else path / file_name(machine.name, dtype)
    machine.save(path)
    print(f"{machine}\n{path}")


if __name__ == "__main__":
    main()
