"""What a call of the pipeline returns, and what it cost."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from diffusers.utils import BaseOutput
from torch import Tensor

Item = TypeVar("Item")


@dataclass
class StageCost:
    """Wall-clock seconds and peak bytes on the device, by stage."""

    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, device: torch.device) -> Iterator[None]:
        """Measure what happens inside."""
        cuda = device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        begin = time.perf_counter()
        yield
        if cuda:
            torch.cuda.synchronize(device)
            self.peak_bytes[name] = max(self.peak_bytes.get(name, 0), torch.cuda.max_memory_allocated(device))
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def each(self, name: str, device: torch.device, items: Iterable[Item]) -> Iterator[Item]:
        """The items, measuring what it takes to make each of them."""
        iterator = iter(items)
        while True:
            with self.stage(name, device):
                item = next(iterator, None)
            if item is None:
                return
            yield item


@dataclass
class ScaleDiTOutput(BaseOutput):
    """What a call returns.

    Attributes:
        images: List of PIL pictures (`output_type="pil"`), `[B, H, W, 3]` array (`"np"`), `[B, 3, H, W]` tensor in
            [0, 1] (`"pt"`), or latents `[B, C, h, w]` (`"latent"`).
        draft_latents: The drafts' normalised latents `[B, C, h/s, w/s]`.
        cost: Seconds and peak memory by stage.
    """

    images: Any
    draft_latents: Tensor | None
    cost: StageCost
