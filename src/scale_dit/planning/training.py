"""What a training step will hold in memory, before any weight is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import nn

from scale_dit.attention import resolve
from scale_dit.errors import UserError
from scale_dit.flow_matching import flow_matching_loss
from scale_dit.lora import ADAPTER, LoraSettings, add_lora
from scale_dit.method import Method
from scale_dit.models.settings import BaseSettings
from scale_dit.planning.components import Components, size_of
from scale_dit.planning.memory import WORKSPACE
from scale_dit.planning.predict import gb
from scale_dit.planning.trace import Trace, run_backward, trace
from scale_dit.planning.work import META, TRACED

STATES = {"adamw": 2, "prodigy": 4}
"""Numbers that an optimiser keeps for each one that is trained."""
OF_OPTIMISER = 2
"""Numbers for each one that is trained, for a moment, when the optimiser steps."""


@dataclass(frozen=True)
class TrainingPlan:
    """Memory of a training step.

    Args:
        base, method, lora: What is trained; see `ScaleDiTModule` on these and on what follows.
        sizes: (height, width) in px of the pictures.
        batch_size: Pictures a step and device.
        device: Where it is trained.
        autocast: Precision of autocast; `None`: there is none.
        averaged: Whether a moving average of the LoRA is kept.
    """

    base: BaseSettings
    method: Method
    lora: LoraSettings
    sizes: tuple[tuple[int, int], ...]
    batch_size: int
    device: torch.device
    backend: str = "auto"
    optimiser: str = "adamw"
    dtype: torch.dtype = torch.float32
    gradient_checkpointing: bool = False
    training_guidance_scale: float = 1.0
    autocast: torch.dtype | None = None
    averaged: bool = True
    components: Components | None = field(default=None, compare=False)

    @property
    def size(self) -> tuple[int, int]:
        """The largest (height, width)."""
        return max(self.sizes, key=lambda size: size[0] * size[1])

    @cached_property
    def parts(self) -> dict[str, int]:
        """Bytes of what is in memory at the peak of a step, by part."""
        built = self._build()
        trained = sum(parameter.numel() * parameter.element_size() for parameter in built.parameters)
        step = self._trace(built, backward=True)
        found = {
            "weights of the base": built.weights,
            "LoRA and its average" if self.averaged else "LoRA": (1 + self.averaged) * trained,
            f"states of {self.optimiser}": STATES[self.optimiser] * trained,
            "activations and gradients": max(step.peak, (1 + OF_OPTIMISER) * trained),
            "libraries": WORKSPACE if self.device.type == "cuda" else 0,
        }
        # They are gone when the transformer comes to a GPU; a processor's memory is where all of it was loaded.
        before = built.texts + (0 if self.device.type == "cuda" else built.weights)
        return found | {"text encoders, before the first step": max(0, before - sum(found.values()))}

    @property
    def peak(self) -> int:
        """Bytes in all."""
        return sum(self.parts.values())

    def forward_trace(self) -> Trace:
        """A step's forward pass; what is kept is what its backward pass needs."""
        return self._trace(self._build(), backward=False)

    def _build(self) -> Built:
        if self.components is not None:
            return _with_lora(self.components, self.base, self.lora)
        return _built(self.base, self.dtype, self.lora)

    def _trace(self, built: Built, backward: bool) -> Trace:
        base = built.driver
        base.gradient_checkpointing = self.gradient_checkpointing
        base.guidance_adapters = (ADAPTER,)
        base.image_adapters = (ADAPTER,) if self.lora.scope == "all" else ()
        for parameter in built.parameters:
            parameter.grad = None  # of an earlier trace
        plan = self.method.plan(self.base, *self.size)
        layout, dtype = plan.layout, self.dtype if self.autocast is None else self.autocast
        head_size = base.transformer.config.attention_head_dim
        backend = resolve(self.backend, self.device, dtype, head_size, layout)
        base.backend = backend if backend in TRACED else "triton"

        def tokens(count: int) -> torch.Tensor:
            return torch.empty(self.batch_size, count, 4 * base.latent_channels, device=META)

        def run() -> torch.Tensor:
            draft = tokens(layout.guidance_tokens) if layout.guidance is not None else None
            text, time = base.blank_text(self.batch_size), torch.empty(self.batch_size, device=META)
            clean, noise = tokens(layout.image.tokens), tokens(layout.image.tokens)
            loss = flow_matching_loss(base, plan, clean, draft, text, text, noise, time, self.training_guidance_scale)
            if backward:
                run_backward(loss)
            return loss

        return trace(run, gradients=True, autocast=self.autocast)

    def check(self, limit: int) -> None:
        """Refuse what does not fit.

        Args:
            limit: Bytes that may be used.

        Raises:
            UserError: With what makes it fit.
        """
        if self.peak <= limit:
            return
        height, width = self.size
        message = (
            f"a training step with {self.batch_size} pictures of {width} x {height} px needs {gb(self.peak)} GB, but "
            f"{gb(limit)} GB are free"
        )
        for way, options in self._remedies():
            if way.peak <= limit:
                raise UserError(f"{message}. {gb(way.peak)} GB are enough with {' '.join(options)}")
        least = ", ".join(f"{name} {gb(count)}" for name, count in way.parts.items() if count)
        raise UserError(
            f"{message}; and still {gb(way.peak)} GB with {' '.join(options)} ({least}). Use a card with more memory, "
            f"smaller pictures (base.native=...), or a smaller base (base=tiny)"
        )

    def _remedies(self) -> list[tuple[TrainingPlan, list[str]]]:
        """Ways to need less, the cheapest in time and quality first, and the options that ask for them."""
        ways: list[tuple[TrainingPlan, list[str]]] = []
        way, options = self, list[str]()
        if not self.gradient_checkpointing:
            way, options = replace(way, gradient_checkpointing=True), [*options, "model.gradient_checkpointing=true"]
            ways.append((way, options))
        batch = self.batch_size // 2
        while batch:
            accumulated = self.batch_size // batch
            smaller = [f"data.batch_size={batch}", f"trainer.accumulate_grad_batches={accumulated}"]
            ways.append((replace(way, batch_size=batch), [*options, *smaller]))
            batch //= 2
        if self.dtype == torch.float32 and self.device.type == "cuda":
            last, options = ways[-1] if ways else (way, options)
            ways.append((replace(last, dtype=torch.bfloat16), ["model.dtype=bfloat16", *options]))
        return ways or [(way, ["batch_size=1"])]

    def table(self, limit: int, actual: int | None = None) -> Table:
        """What a step takes, as a table; with what it took, if that is known."""
        height, width = self.size
        title = f"Memory of a training step: {self.batch_size} pictures of {width} x {height} px"
        table = Table(title=title, title_justify="left")
        table.add_column("part")
        table.add_column("GB", justify="right")
        for name, count in self.parts.items():
            if count:
                table.add_row(name, gb(count))
        table.add_row("in all", f"{gb(self.peak)} of {gb(limit)}")
        if actual is not None:
            process = " (the whole process)" if self.device.type == "cpu" else ""
            table.add_row(f"actual{process}", gb(actual))
        return table


class Built(NamedTuple):
    """A base with a fresh LoRA, on `meta`."""

    weights: int
    """Bytes of the base without text encoders and LoRA."""
    texts: int
    """Bytes of the text encoders."""
    driver: Any
    parameters: list[nn.Parameter]
    """The LoRA's."""


def _with_lora(components: Components, base: BaseSettings, lora: LoraSettings) -> Built:
    texts = sum(map(size_of, components.text_encoders.values()))
    weights = sum(map(size_of, components.modules.values())) - texts
    driver = components.driver(base, "auto")
    driver.freeze()
    return Built(weights, texts, driver, add_lora(components.transformer, lora))


@lru_cache(maxsize=2)
def _built(base: BaseSettings, dtype: torch.dtype, lora: LoraSettings) -> Built:
    return _with_lora(Components.of(base, dtype), base, lora)
