"""The work of one picture: what each stage computes and holds, traced on a base without weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from scale_dit.attention import resolve
from scale_dit.autoencoder.decoding import DECODES
from scale_dit.autoencoder.layers import streamed_decode, streamed_encode
from scale_dit.autoencoder.memory import decode_bytes, host_bytes, upscaling
from scale_dit.autoencoder.streaming import Streaming
from scale_dit.method import Method, Plan, draft_plan
from scale_dit.models.settings import BaseSettings
from scale_dit.planning.components import Components
from scale_dit.planning.trace import Trace, trace
from scale_dit.sampling import make_scheduler
from scale_dit.stage import Stage

if TYPE_CHECKING:
    from scale_dit.generation.pictures import Sampling

META = torch.device("meta")
TRACED = ("masked", "sdpa", "triton")
"""Attention backends that run on `meta`; others are traced as `triton`, whose reads and writes are the fewest."""


@dataclass(frozen=True)
class Work:
    """Traces of the parts of one picture.

    Attributes:
        text: Encoding the prompt, and the negative one if a stage evaluates it.
        draft, refine: One step, all branches; `None`: there are none.
        guidance: The guidance pass.
        decode: Decoding in every mode, see `scale_dit.autoencoder.Decoding`: the picture, or the draft if that is all.
        decode_peaks: Bytes that it takes in every mode.
        host_bytes: Bytes of host memory that it takes in the mode `host`.
        draft_steps, refine_steps: How often.
        draft_branches, refine_branches: How often a step calls the transformer: twice for classifier-free guidance.
    """

    text: Trace
    draft: Trace | None
    draft_steps: int
    draft_branches: int
    guidance: Trace | None
    refine: Trace | None
    refine_steps: int
    refine_branches: int
    decode: dict[str, Trace]
    decode_peaks: dict[str, int]
    host_bytes: int


class Tracer:
    """Traces pictures on one base.

    Args:
        base, method, sampling: As pictures are made.
        components: The base's parts on `meta`.
        backend: Attention backend, `auto` included.
        device: Where pictures are made.
        drafts_only: Whether drafts are all that is made.
    """

    def __init__(
        self,
        base: BaseSettings,
        method: Method,
        sampling: Sampling,
        components: Components,
        backend: str,
        device: torch.device,
        drafts_only: bool = False,
    ):
        self.drafts_only = drafts_only
        self.base, self.method, self.sampling, self.components = base, method, sampling, components
        self.backend, self.device = backend, device
        self.driver: Any = components.driver(base, "auto")
        self.work = lru_cache(maxsize=None)(self._work)
        self.known: dict[tuple[object, ...], Trace] = {}

    def _work(self, height: int, width: int, feed_forward_tokens: int) -> Work:
        """The work of a picture of `height` x `width` px, feed-forward layers taking so many tokens at a time."""
        base, sampling = self.base, self.sampling
        self.driver.feed_forward_tokens = feed_forward_tokens
        scale = sampling.scale_for(base, height, width)
        plan = replace(self.method, scale=scale).plan(base, height, width)
        reads_draft = plan.layout.guidance is not None
        needs_draft = self.drafts_only or reads_draft or sampling.start < 1 or sampling.low_pass > 0
        refine_scale = base.guidance_scale_for(sampling.guidance_scale, reads_draft)
        draft_scale = base.guidance_scale_for(sampling.draft_guidance_scale, False)
        refines, below = not self.drafts_only, draft_plan(base, height, width, scale)
        guidance, keys_values = self._guidance(plan, refine_scale) if reads_draft and refines else (None, None)
        has_negative = base.has_negative_branch(refine_scale, draft_scale)
        grid = below.layout.image
        sides = (height, width) if refines else (grid.height * base.token_size, grid.width * base.token_size)
        decode, decode_peaks = self._decode(*sides)
        return Work(
            self._text(2 if has_negative else 1),
            self._step(below, draft_scale, None) if needs_draft else None,
            base.steps if sampling.draft_steps is None else sampling.draft_steps,
            1 + base.has_negative_branch(draft_scale),
            guidance,
            self._step(plan, refine_scale, keys_values) if refines else None,
            base.steps if sampling.steps is None else sampling.steps,
            1 + base.has_negative_branch(refine_scale),
            decode,
            decode_peaks,
            host_bytes(self.components.modules["vae"], *sides),
        )

    def _text(self, prompts: int) -> Trace:
        def encode() -> None:
            for _ in range(prompts):
                for encoder in self.components.text_encoders.values():
                    longest = getattr(encoder.config, "max_position_embeddings", self.base.text_length)
                    encoder(torch.zeros(1, min(longest, self.base.text_length), dtype=torch.long, device=META))

        return self._once(("text", prompts), encode)

    def _guidance(self, plan: Plan, scale: float) -> tuple[Trace, Sequence[tuple[Tensor, Tensor]]]:
        self._take_backend(plan.guidance_layout)
        kept: list[tuple[Tensor, Tensor]] = []

        def run() -> None:
            tokens = torch.empty(1, plan.layout.guidance_tokens, self._token_width, device=META)
            kept.extend(self.driver.guidance_pass(tokens, self.driver.blank_text().pooled, plan, scale))

        return trace(run), kept

    def _step(self, plan: Plan, scale: float, keys_values: Sequence[tuple[Tensor, Tensor]] | None) -> Trace:
        self._take_backend(plan.layout)
        grid = plan.layout.image

        def run() -> Tensor:
            text = self.driver.blank_text()
            negative = text if self.base.has_negative_branch(scale) else None
            latents = torch.empty(1, self.driver.latent_channels, 2 * grid.height, 2 * grid.width, device=META)
            stage = Stage(self.driver, plan, text, negative, scale, keys_values)
            return stage.sample(latents, make_scheduler(1, self.base.shift, 1.0, torch.device("cpu")))

        # Drafts of many sizes are alike.
        reads = keys_values is not None
        return self._once(("step", plan.layout.json, scale, reads, self.driver.feed_forward_tokens), run)

    def _decode(self, height: int, width: int) -> tuple[dict[str, Trace], dict[str, int]]:
        """Traces of decoding whole and streamed, and bytes that every mode takes."""
        vae: Any = self.components.modules["vae"]
        factor = upscaling(vae)
        shape = (1, vae.config.latent_channels, height // factor, width // factor)

        def latents() -> Tensor:
            return torch.empty(shape, dtype=vae.dtype, device=META)

        whole = self._once(("decode", *shape), lambda: vae.decode(latents()).sample)
        streamed = self._once(("streamed", *shape), lambda: list(streamed_decode(vae, latents(), _at_once())))
        tile = self.sampling.decode_tile
        peaks = {mode: decode_bytes(vae, height, width, mode, tile, device=self.device) for mode in DECODES}
        return dict.fromkeys(DECODES, streamed) | {"whole": whole}, peaks

    def encoding(self, height: int, width: int, whole: bool) -> Trace:
        """Encoding a picture of `height` x `width` px, untiled or streamed."""
        vae: Any = self.components.modules["vae"]

        def encode() -> object:
            picture = torch.empty(1, 3, height, width, dtype=vae.dtype, device=META)
            return vae.encode(picture) if whole else streamed_encode(vae, picture, _at_once())

        return self._once(("encode", height, width, whole), encode)

    def _once(self, key: tuple[object, ...], code: Callable[[], object]) -> Trace:
        """The trace of what has this key, made when it is first asked for."""
        if key not in self.known:
            self.known[key] = trace(code)
        return self.known[key]

    @property
    def _token_width(self) -> int:
        return 4 * self.driver.latent_channels

    def _take_backend(self, layout: Any) -> None:
        head_size = self.components.transformer.config.attention_head_dim
        backend = resolve(self.backend, self.device, self.driver.dtype, head_size, layout)
        self.driver.backend = backend if backend in TRACED else "triton"


def _at_once() -> Streaming:
    """Streamed in one band: what is computed is the same. Statistics of norms are kept in it: it serves one trace."""
    return Streaming(META, META, band_elements=2**60, way="torch")
