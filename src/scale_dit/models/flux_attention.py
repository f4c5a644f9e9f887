"""Attention of FLUX's blocks over text, image and guidance tokens, as a processor of diffusers' own modules."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttention
from scale_dit_kernels.rotation import norm_rotate
from torch import Tensor, nn

from scale_dit.attention import QueryKeyValue, attend, attend_joined, resolve
from scale_dit.attention.triton import HEAD_SIZES
from scale_dit.layout import Layout

KeysValues = tuple[Tensor, Tensor]
"""Keys and values of one block, `[B, L, H, D]` each, keys normalised and rotated."""


@dataclass
class BlockAttention:
    """What the attention of one block needs to know beside its inputs.

    Attributes:
        layout: Who reads whom.
        backend: Name of the attention backend.
        guidance: Keys and values of this block's guidance tokens.
        recorded: Filled with this block's image keys and values, if given; not again when the block is recomputed in
            the backward pass, whose graph the keys would keep alive.
        feed_forward_tokens: Tokens that go through a layer at a time which attention and feed-forward share.
    """

    layout: Layout
    backend: str = "auto"
    guidance: KeysValues | None = None
    recorded: list[KeysValues] | None = field(default=None, compare=False)
    feed_forward_tokens: int | None = None

    def record(self, image: QueryKeyValue) -> None:
        """Keep the image's keys and values, if they are asked for, and nothing that they are a part of."""
        if self.recorded == []:
            self.recorded.append((image[1].contiguous(), image[2].contiguous()))


class LayoutAttnProcessor:
    """Attention over text, image and guidance segments; without `block_attention` it is the stock processor.

    Args:
        stock: The processor that diffusers gives these blocks.
    """

    _attention_backend = None
    _parallel_config = None

    def __init__(self, stock: Any) -> None:
        self.stock = stock

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        block_attention: BlockAttention | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The signature that `FluxAttention` and `Flux2Attention` call; `[B, S, C]` in and out."""
        if block_attention is None:
            return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        if image_rotary_emb is None:
            raise ValueError("FLUX's attention needs rotary embeddings")
        length = block_attention.layout.text
        backend = resolve(
            block_attention.backend, hidden_states.device, hidden_states.dtype, attn.head_dim, block_attention.layout
        )
        fused = fuses(backend)
        text, image = _text_and_image(attn, hidden_states, encoder_hidden_states, image_rotary_emb, length, fused)
        block_attention.record(image)
        streams = text, image, block_attention.guidance
        if encoder_hidden_states is None:
            return attend_joined(*streams, block_attention.layout, backend).flatten(2)
        text_out, image_out = attend(*streams, block_attention.layout, backend)
        del streams, text, image  # the output projection needs the room
        return attn.to_out[1](attn.to_out[0](image_out.flatten(2))), attn.to_add_out(text_out.flatten(2))


def _text_and_image(
    attn: FluxAttention,
    hidden: Tensor,
    text_hidden: Tensor | None,
    rotary: tuple[Tensor, Tensor],
    length: int,
    fused: bool,
) -> tuple[QueryKeyValue | None, QueryKeyValue]:
    """Query, key and value of both parts: a single block gets `length` text tokens in front of the image's."""
    if length == 0:
        return None, project(attn, hidden, rotary, fused)
    if text_hidden is None:
        return split_text(project(attn, hidden, rotary, fused), length)
    cosine, sine = rotary
    text = project_text(attn, text_hidden, (cosine[:length], sine[:length]), fused)
    return text, project(attn, hidden, (cosine[length:], sine[length:]), fused)


def project(attn: FluxAttention, hidden: Tensor, rotary: tuple[Tensor, Tensor], fused: bool) -> QueryKeyValue:
    """Query, key and value `[B, S, H, D]` of image tokens `[B, S, C]`, or of all tokens in a single block.

    Queries and keys are normalised and turned to their places; `rotary` is cosine and sine, `[S, D]` each.
    """
    # One after the other, so that only one is there twice, as projected and as turned.
    query, key = (
        norm_and_rotate(projection(hidden).unflatten(-1, (-1, attn.head_dim)), norm, rotary, fused)
        for projection, norm in ((attn.to_q, attn.norm_q), (attn.to_k, attn.norm_k))
    )
    return query, key, attn.to_v(hidden).unflatten(-1, (-1, attn.head_dim))


def split_text(joined: QueryKeyValue, length: int) -> tuple[QueryKeyValue | None, QueryKeyValue]:
    """Text and image of a sequence with `length` text tokens in front."""
    if length == 0:
        return None, joined
    query, key, value = joined
    return (
        (query[:, :length], key[:, :length], value[:, :length]),
        (query[:, length:], key[:, length:], value[:, length:]),
    )


def project_text(attn: FluxAttention, hidden: Tensor, rotary: tuple[Tensor, Tensor], fused: bool) -> QueryKeyValue:
    """Query, key and value `[B, T, H, D]` of text tokens `[B, T, C]` in a double block, as `project`."""
    query, key, value = (
        projection(hidden).unflatten(-1, (-1, attn.head_dim))
        for projection in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    )
    query, key = (
        norm_and_rotate(part, norm, rotary, fused)
        for part, norm in ((query, attn.norm_added_q), (key, attn.norm_added_k))
    )
    return query, key, value


def fuses(backend: str) -> bool:
    """Whether norm and rotation are one pass over memory, which they are beside the project's attention kernel."""
    return backend == "triton"


def norm_and_rotate(tensor: Tensor, norm: nn.RMSNorm, rotary: tuple[Tensor, Tensor], fused: bool) -> Tensor:
    """Queries or keys `[B, S, H, D]`, normalised and turned; fused, they are not rounded in between."""
    # A weight elsewhere is brought by a hook of the module when it is called.
    here = norm.weight is not None and norm.weight.device == tensor.device
    if fused and here and tensor.shape[-1] in HEAD_SIZES:
        eps = torch.finfo(tensor.dtype).eps if norm.eps is None else norm.eps
        return norm_rotate(tensor, norm.weight, *rotary, eps)
    return apply_rotary_emb(norm(tensor), rotary, sequence_dim=1)
