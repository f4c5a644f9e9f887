"""The plan of a run: made before weights are loaded, put into effect after, and held against what happened."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from scale_dit.method import Method
from scale_dit.models.settings import BaseSettings
from scale_dit.pipeline import ScaleDiTPipeline
from scale_dit.planning.apply import apply_memory
from scale_dit.planning.calibrate import measure
from scale_dit.planning.components import Components
from scale_dit.planning.machine import Machine, cache_folder, device_name, file_name, find_machine, free_bytes
from scale_dit.planning.memory import Memory
from scale_dit.planning.predict import Planner, Prediction
from scale_dit.planning.report import Actual, before
from scale_dit.planning.work import Tracer
from scale_dit.regions import share_of_boxes, whole_windows

if TYPE_CHECKING:
    from scale_dit.generation.pictures import Picture, Sampling
    from scale_dit.generation.remake import Remake

MARGIN = 0.95
"""Share of the free memory that a plan may use: allocators lose some between tensors."""


class RunPlan:
    """How the pictures of a run are made.

    Args:
        pictures: All that are to be made.
        base, method, sampling: How.
        memory: What the user set.
        backend: Attention backend.
        device, dtype: Where, and in which precision.
        remake: Windows of a finished picture that are all that is made.
        drafts_only: Whether drafts are all that is made.
        encoded: Says at which sizes (height, width) in px pictures are encoded that are there, instead of a draft being
            made; `None`: it is made.

    Raises:
        UserError: The largest picture does not fit in any way that is left open; with the largest size that does.
    """

    def __init__(
        self,
        pictures: Sequence[Picture],
        base: BaseSettings,
        method: Method,
        sampling: Sampling,
        memory: Memory,
        backend: str,
        device: torch.device,
        dtype: torch.dtype,
        remake: Remake | None = None,
        drafts_only: bool = False,
        encoded: Callable[[Picture], Sequence[tuple[int, int]] | None] = lambda picture: None,
    ):
        self.pictures, self.base, self.sampling, self.device = pictures, base, sampling, device
        self.method, self.remake, self.encoded = method, remake, encoded
        components = Components.of(base, dtype)
        tracer = Tracer(base, method, sampling, components, backend, device, drafts_only)
        self.machine = machine_of(device, dtype)
        self.planner = Planner(tracer, components, self.machine, memory, device.type == "cuda")
        self.limit = int(MARGIN * free_bytes(device)) if memory.limit_gb is None else int(memory.limit_gb * 1e9)
        self.memory = self.planner.choose([(each.height, each.width) for each in pictures], self.limit)
        self.actual = Actual()
        self.noted: set[str] = set()

    def show(self, console: Console) -> None:
        """Print what the largest picture will take, if it is the first of them."""
        largest = max(self.pictures, key=lambda each: each.height * each.width)
        console.print(before(self._predicted(largest).as_first(), len(self.pictures), self.limit, self.machine.name))

    def prepare(self, pipeline: ScaleDiTPipeline, texts: Sequence[str] = ()) -> None:
        """Bring a pipeline that is in host memory to the device as planned; `texts` are encoded beside the prompts."""
        prompts = {text for each in self.pictures for text in (each.prompt, each.negative_prompt)}
        prompts |= {window.prompt for each in self.pictures for window in each.window_prompts}
        every = [(text,) for text in sorted(prompts | set(texts))]
        self.actual.ahead = apply_memory(pipeline, self.memory, self.device, every)

    def note(self, picture: Picture, seconds: Mapping[str, float], peak_bytes: Mapping[str, int]) -> None:
        """Note what a picture took, by stage; of prompts that were encoded beforehand, each once."""
        predicted = self._predicted(picture)
        if not self.actual.pictures:
            predicted = predicted.as_first()
        elif self.actual.ahead.seconds and picture.prompt in self.noted:
            predicted = replace(predicted, seconds=predicted.seconds | {"text": 0.0})
        self.noted.add(picture.prompt)
        self.actual.add(predicted, seconds, peak_bytes)

    def show_actual(self, console: Console) -> None:
        """Print what the pictures took beside what was predicted."""
        if self.actual.pictures:
            console.print(self.actual.table())

    def _predicted(self, picture: Picture) -> Prediction:
        """What a picture takes, windows with prompts of their own and pictures that are encoded included."""
        found = self.planner.predict(picture.height, picture.width, self.memory)
        sizes = self.encoded(picture)
        if sizes is not None:
            found = self.planner.encoded(found, sizes, self.limit)
        if "refine" not in found.seconds or (self.remake is None and not picture.window_prompts):
            return found
        layout = self.sampling.recipe(self.base, self.method, picture.height, picture.width).plan.layout
        token = self.base.token_size
        chosen = None if self.remake is None else self.remake.chosen(layout, token)
        share = 1.0 if chosen is None else share_of_boxes(chosen, layout)
        for each in picture.window_prompts:
            windows = whole_windows(each.tokens(layout.image, token), layout)
            share += share_of_boxes(windows if chosen is None else windows & chosen, layout)
        return found.in_boxes(share)


def machine_of(device: torch.device, dtype: torch.dtype) -> Machine:
    """The profile of the device: a known one, else it is measured now, which takes a minute, and kept."""
    known = find_machine(device, dtype)
    if known is not None:
        return known
    machine = measure(device, dtype)
    machine.save(cache_folder() / file_name(device_name(device), dtype))
    return machine
