"""Attention of FLUX.2's single blocks, whose projections are one layer with the feed-forward's first."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_flux2 import Flux2ParallelSelfAttention, Flux2ParallelSelfAttnProcessor
from torch import Tensor

from scale_dit.attention import QueryKeyValue, attend_joined, resolve
from scale_dit.models.chunking import in_parts
from scale_dit.models.flux_attention import BlockAttention, fuses, norm_and_rotate, split_text


class ParallelAttnProcessor:
    """Attention over text, image and guidance segments; without `block_attention` it is the stock processor."""

    _attention_backend = None
    _parallel_config = None

    def __init__(self) -> None:
        self.stock = Flux2ParallelSelfAttnProcessor()

    def __call__(
        self,
        attn: Flux2ParallelSelfAttention,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        block_attention: BlockAttention | None = None,
    ) -> Tensor:
        """The signature that `Flux2ParallelSelfAttention` calls; `[B, T + S, C]` in and out."""
        if block_attention is None:
            return self.stock(attn, hidden_states, attention_mask, image_rotary_emb)
        if image_rotary_emb is None:
            raise ValueError("FLUX's attention needs rotary embeddings")
        layout, tokens = block_attention.layout, block_attention.feed_forward_tokens
        backend = resolve(block_attention.backend, hidden_states.device, hidden_states.dtype, attn.head_dim, layout)
        joined, hidden = project_parallel(attn, hidden_states, image_rotary_emb, fuses(backend), tokens)
        text, image = split_text(joined, layout.text)
        block_attention.record(image)
        read = attend_joined(text, image, block_attention.guidance, layout, backend).flatten(2)
        del joined, text, image  # the output projection needs the room

        def output(read: Tensor, hidden: Tensor) -> tuple[Tensor]:
            return (attn.to_out(torch.cat([read, hidden], dim=-1)),)

        return in_parts(output, tokens, read, hidden)[0]


def project_parallel(
    attn: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor], fused: bool, tokens: int | None
) -> tuple[QueryKeyValue, Tensor]:
    """Query, key and value `[B, S, H, D]` of all tokens `[B, S, C]`, and the feed-forward's hidden layer `[B, S, M]`.

    Args:
        tokens: Tokens that go through the layer at a time; it is nine times as wide as they are.
    """
    widths = [3 * attn.inner_dim, attn.mlp_hidden_dim * attn.mlp_mult_factor]

    def widen(hidden: Tensor, *rotary: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        projected, inner = attn.to_qkv_mlp_proj(hidden).split(widths, dim=-1)
        inner = attn.mlp_act_fn(inner)
        query, key, value = (part.unflatten(-1, (-1, attn.head_dim)) for part in projected.chunk(3, dim=-1))
        turns = rotary[0][0], rotary[1][0]
        query, key = (
            norm_and_rotate(part, norm, turns, fused) for part, norm in ((query, attn.norm_q), (key, attn.norm_k))
        )
        return query, key, value, inner

    query, key, value, inner = in_parts(widen, tokens, hidden, *(each[None] for each in rotary))
    return (query, key, value), inner
