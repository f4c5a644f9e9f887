"""Feed-forward layers a part of the tokens at a time: their hidden layer is what a block holds most of.

Every token's feed-forward is its own, so parts give what the whole gives, but for the rounding of a matrix product of
another height. The blocks run unmodified: only while one runs are its layers' `forward` replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Layer = Callable[..., Tensor]
Outputs = TypeVar("Outputs", bound=tuple[Tensor, ...])


@contextmanager
def chunked_feed_forward(block: Any, tokens: int | None) -> Iterator[None]:
    """Let the feed-forward of a block take at most `tokens` tokens at a time; `None` and 0 change nothing.

    Without gradients only: they would keep every part's hidden layer anyway.
    """
    if not tokens or torch.is_grad_enabled():
        yield
        return
    parts = dict(_separate(block, tokens) or _parallel(block, tokens))
    before = {layer: layer.__dict__.get("forward") for layer in parts}
    for layer, by_parts in parts.items():
        layer.forward = by_parts
    try:
        yield
    finally:
        for layer, own in before.items():
            if own is None:
                del layer.forward
            else:  # a hook of diffusers lives there
                layer.forward = own


def _separate(block: Any, tokens: int) -> list[tuple[nn.Module, Layer]]:
    """Double blocks: the feed-forward of each stream is a module of its own."""
    layers = [getattr(block, name) for name in ("ff", "ff_context") if hasattr(block, name)]
    return [(layer, _by_parts(layer.forward, tokens)) for layer in layers]


def _parallel(block: Any, tokens: int) -> list[tuple[nn.Module, Layer]]:
    """Single blocks of FLUX.1: `proj_out(cat([attention(x), act_mlp(proj_mlp(x))]))`.

    All but the last layer set aside what they have and hand on nothing, so nothing is joined; the last one does their
    work part by part, over the attention's result, which nobody else reads.
    """
    if not hasattr(block, "proj_mlp"):
        return []
    attend, widen, activate, narrow = (
        layer.forward for layer in (block.attn, block.proj_mlp, block.act_mlp, block.proj_out)
    )
    aside: dict[str, Tensor] = {}

    def set_input_aside(normed: Tensor) -> Tensor:
        aside["normed"] = normed
        return normed[..., :0]

    def set_output_aside(*streams: Tensor, **options: Any) -> Tensor:
        aside["read"] = attend(*streams, **options)
        return aside["normed"][..., :0]

    def last_three(nothing: Tensor) -> Tensor:
        def part(read: Tensor, normed: Tensor) -> tuple[Tensor]:
            return (narrow(torch.cat([read, activate(widen(normed))], dim=-1)),)

        read, normed = aside.pop("read"), aside.pop("normed")
        return in_parts(part, tokens, read, normed, into=(read,))[0]

    return [
        (block.proj_mlp, set_input_aside),
        (block.act_mlp, _hand_on),
        (block.attn, set_output_aside),
        (block.proj_out, last_three),
    ]


def _hand_on(hidden: Tensor) -> Tensor:
    return hidden


def _by_parts(forward: Layer, tokens: int) -> Layer:
    """`forward` over `[B, S, C]`, at most `tokens` of S at a time."""
    return lambda hidden: in_parts(lambda part: (forward(part),), tokens, hidden)[0]


def in_parts(
    forward: Callable[..., Outputs], tokens: int | None, *inputs: Tensor, into: Sequence[Tensor] | None = None
) -> Outputs:
    """`forward` over tensors `[B, S, C]`, at most `tokens` of S at a time.

    `None` and 0 are all at once, as it is with gradients.

    Args:
        into: Tensors `[B, S, ...]` for the results, inputs among them if they are not needed any more; those of another
            width or dtype than the results, as all without `into`, are made.
    """
    length = inputs[0].shape[1]
    if not tokens or torch.is_grad_enabled() or length <= tokens:
        return forward(*inputs)
    outputs: Any = into
    for first in range(0, length, tokens):
        parts = forward(*(each[:, first : first + tokens] for each in inputs))
        if first == 0:
            outputs = tuple(map(_room, parts, outputs or parts, [length] * len(parts)))
        for output, part in zip(outputs, parts, strict=True):
            output[:, first : first + part.shape[1]] = part
        del parts, part  # the next ones need the room
    return outputs


def _room(part: Tensor, offered: Tensor, length: int) -> Tensor:
    """Room for `length` tokens of such parts: what is offered, if it is as large."""
    shape = (len(part), length, *part.shape[2:])
    return offered if offered.shape == shape and offered.dtype == part.dtype else part.new_empty(shape)
