"""What every family shares: the guidance pass and the image pass, over the unmodified blocks of diffusers.

What differs from stock is the attention processor, which reads the layout, and that blocks are driven here instead of
in the transformer's `forward`: the guidance pass has no text and no noise and needs keys and values only, and the
timestep stays in float32 up to its embedding. A family says how its time is embedded, how its blocks are called, where
its tokens sit, and how its text and pictures are encoded.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scale_dit.anchors import ntk_theta, yarn_rotary
from scale_dit.attention import avoid_failing_kernels
from scale_dit.errors import UserError
from scale_dit.lora import active_adapters
from scale_dit.method import Method, Plan
from scale_dit.models.chunking import chunked_feed_forward
from scale_dit.models.flux_attention import BlockAttention, KeysValues, fuses
from scale_dit.models.hooks import called, calls_transformer
from scale_dit.models.keys_values import HostKeysValues
from scale_dit.models.parts import Parts
from scale_dit.models.settings import BaseSettings
from scale_dit.models.single_file import transformer_of
from scale_dit.models.text import Text

Rotary = tuple[Tensor, Tensor]
"""Cosine and sine of every token's angles, `[S, D]` each."""


class Driver(Parts):
    """Drives a stock pipeline's transformer, text encoders and autoencoder.

    Args:
        pipeline: A stock pipeline of the family; its transformer gets attention processors which by themselves change
            nothing.
        settings: The base's geometry.
        backend: Attention backend, see `scale_dit.attention`.
        gradient_checkpointing: Recompute blocks in the backward pass.

    Attributes:
        guidance_adapters, image_adapters: Adapters that act in the guidance pass, and in the image pass.
        feed_forward_tokens: Tokens that go through a feed-forward layer at a time; `None`: all.
        keys_values_on_host: Keep the draft's keys and values in host memory.
    """

    def __init__(
        self, pipeline: Any, settings: BaseSettings, backend: str = "auto", gradient_checkpointing: bool = False
    ):
        super().__init__(pipeline, settings)
        self.backend, self.gradient_checkpointing = backend, gradient_checkpointing
        self.feed_forward_tokens: int | None = None
        self.keys_values_on_host = False
        self.guidance_adapters: tuple[str, ...] = ()
        self.image_adapters: tuple[str, ...] = ()
        if self.transformer is not None:  # else all that is asked of it is to decode
            avoid_failing_kernels(self.transformer.config.attention_head_dim)
            self.set_processors()

    @classmethod
    def load(
        cls,
        settings: BaseSettings,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> Self:
        """Load the weights that `settings.path` names, and the transformer of `settings.transformer_file`.

        Raises:
            UserError: The weights cannot be had.
        """
        settings.check_weights()
        pipeline: Any = cls.stock.from_pretrained(settings.path, dtype=dtype, **transformer_of(settings, dtype))
        return cls(pipeline.to(device), settings, **options)

    @classmethod
    def from_components(cls, components: dict[str, Any], settings: BaseSettings, backend: str = "auto") -> Self:
        """Drive components that are loaded already, by the names of the stock pipeline."""
        return cls(cls.stock_pipeline(components, settings), settings, backend)

    @abstractmethod
    def set_processors(self) -> None:
        """Give every block an attention processor that reads `BlockAttention`."""

    @abstractmethod
    def embed_time(self, time: Tensor, guidance_scale: float, pooled: Tensor) -> Any:
        """What `call_block` modulates blocks with, at the times `[B]` in [0, 1], float32."""

    @abstractmethod
    def call_block(
        self, block: Any, image: Tensor, text: Tensor, modulation: Any, rotary: Rotary, attention: BlockAttention
    ) -> tuple[Tensor, Tensor]:
        """Text and image behind a block."""

    @abstractmethod
    def block_keys_values(self, block: Any, hidden: Tensor, modulation: Any, rotary: Rotary) -> KeysValues:
        """Keys and values of a block without the rest of it: what is behind the last block's is not needed."""

    @abstractmethod
    def last_layer(self, image: Tensor, modulation: Any) -> Tensor:
        """Velocity of the image tokens behind all blocks."""

    @abstractmethod
    def token_ids(self, ids: Tensor) -> Tensor:
        """All rotary ids of tokens that a plan gives (time, row, column), `[S, 3]` -> `[S, axes]`."""

    @abstractmethod
    def text_ids(self, length: int) -> Tensor:
        """Rotary ids of text tokens, `[T, axes]` float32."""

    @calls_transformer
    def guidance_pass(self, tokens: Tensor, pooled: Tensor, plan: Plan, guidance_scale: float) -> Sequence[KeysValues]:
        """Keys and values of the draft's tokens in every block: the base with the LoRA, at timestep 0.

        They depend on the draft and the pooled prompt alone, so one pass serves all steps and both branches of
        classifier-free guidance.

        Args:
            tokens: Clean draft tokens `[B, L, 4C]` in the memory order of `plan`.
            pooled: Pooled positive prompts `[B, P]`.
            guidance_scale: The embedded guidance scale of a distilled base; ignored by others.

        Returns:
            For each block, keys and values `[B, L, H, D]`.
        """
        adapters = self.guidance_adapters
        with active_adapters(self.transformer, adapters):
            hidden = self.transformer.x_embedder(tokens.to(self.dtype))
            time = torch.zeros(len(tokens), device=tokens.device)
            modulation = self.embed_time(time, guidance_scale, pooled)
        rotary = self.rotary(self.token_ids(plan.guidance_ids), plan.method, hidden.device)
        no_text = hidden[:, :0]
        keys_values: list[KeysValues] | HostKeysValues
        keys_values = HostKeysValues(hidden.device) if self.keys_values_on_host else []
        *blocks, last = self.blocks
        for block in blocks:
            recorded: list[KeysValues] = []
            attention = BlockAttention(plan.guidance_layout, self.backend, recorded=recorded)
            _, hidden = self._run(block, adapters, hidden, no_text, modulation, rotary, attention)
            keys_values.extend(recorded)
        with called(last), active_adapters(last, adapters):
            keys_values.extend([self.block_keys_values(last, hidden, modulation, rotary)])
        return keys_values

    @calls_transformer
    def image_pass(
        self,
        tokens: Tensor,
        text: Text,
        time: Tensor,
        plan: Plan,
        guidance: Sequence[KeysValues] | None,
        guidance_scale: float,
    ) -> Tensor:
        """Velocity of the image tokens: the base over text and image, reading the draft's keys and values.

        Args:
            tokens: Noisy tokens `[B, N, 4C]` in the memory order of `plan`.
            time: `[B]` in [0, 1], float32; 1 is pure noise.
            guidance: What `guidance_pass` returned, or `None` for a plan without guidance.

        Returns:
            `[B, N, 4C]`, in the memory order of `plan`.
        """
        transformer, adapters = self.transformer, self.image_adapters
        if text.tokens.shape[1] != plan.layout.text:
            raise UserError(f"{text.tokens.shape[1]} text tokens were given, but the plan is for {plan.layout.text}.")
        with active_adapters(transformer, adapters):
            image = transformer.x_embedder(tokens.to(self.dtype))
            modulation = self.embed_time(time, guidance_scale, text.pooled)
            words = transformer.context_embedder(text.tokens.to(self.dtype))
        ids = torch.cat([self.text_ids(plan.layout.text), self.token_ids(plan.image_ids)])
        rotary = self.rotary(ids, plan.method, image.device)
        for index, block in enumerate(self.blocks):
            block_guidance = guidance[index] if guidance is not None else None
            attention = BlockAttention(plan.layouts[index % 2], self.backend, block_guidance)
            words, image = self._run(block, adapters, image, words, modulation, rotary, attention)
        with active_adapters(transformer, adapters):
            return self.last_layer(image, modulation)

    @property
    def blocks(self) -> list[nn.Module]:
        """Double blocks, then single ones."""
        return [*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks]

    def fuses(self) -> bool:
        """Whether norm and rotation of queries and keys are one pass over memory."""
        return fuses(self.backend)

    def _run(
        self,
        block: nn.Module,
        adapters: tuple[str, ...],
        image: Tensor,
        text: Tensor,
        modulation: Any,
        rotary: Rotary,
        attention: BlockAttention,
    ) -> tuple[Tensor, Tensor]:
        """One block with the given adapters, also when it is recomputed in the backward pass."""
        attention.feed_forward_tokens = self.feed_forward_tokens

        def forward(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
            with active_adapters(block, adapters), chunked_feed_forward(block, self.feed_forward_tokens):
                return self.call_block(block, image, text, modulation, rotary, attention)

        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(forward, image, text, use_reentrant=False)
        return forward(image, text)

    def rotary(self, ids: Tensor, method: Method, device: torch.device) -> Rotary:
        """Cosine and sine of tokens at `ids` `[S, axes]`; NTK and YaRN slow rows and columns, and no other axis."""
        embed = self.transformer.pos_embed
        ids = ids.to(device)
        if method.yarn != 1:
            native = self.settings.native // self.settings.token_size
            factors = (1.0, method.yarn, method.yarn, *(1.0 for _ in embed.axes_dim[3:]))
            return yarn_rotary(ids, embed.theta, embed.axes_dim, factors, native)
        plain = embed(ids)
        if method.ntk == 1:
            return plain
        before, rows, columns = embed.axes_dim[:3]
        slow = type(embed)(ntk_theta(embed.theta, method.ntk, rows), embed.axes_dim)(ids)
        places = slice(before, before + rows + columns)
        for part, slower in zip(plain, slow, strict=True):
            part[:, places] = slower[:, places]
        return plain
