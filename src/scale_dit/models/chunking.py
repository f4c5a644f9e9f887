"""Feed-forward layers a part of the tokens at a time: their hidden layer is what a block holds most of.

Every token's feed-forward is its own, so parts give what the whole gives, but for the rounding of a matrix product of
another height. The blocks run unmodified: only while one runs are its layers' `forward` replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Layer = Callable[[Tensor], Tensor]
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
    """Single blocks of FLUX.1: `proj_out(cat([attention, act_mlp(proj_mlp(x))]))`.

    The first two layers hand on `x`, and the last one, which gets `cat([attention, x])`, does their work part by part.
    """
    if not hasattr(block, "proj_mlp"):
        return []
    widen, activate, narrow = block.proj_mlp.forward, block.act_mlp.forward, block.proj_out.forward
    width = block.proj_mlp.in_features

    def all_three(joined: Tensor) -> Tensor:
        attention, hidden = joined.split([joined.shape[-1] - width, width], dim=-1)
        return narrow(torch.cat([attention, activate(widen(hidden))], dim=-1))

    return [
        (block.proj_mlp, _hand_on),
        (block.act_mlp, _hand_on),
        (block.proj_out, _by_parts(all_three, tokens)),
    ]


def _hand_on(hidden: Tensor) -> Tensor:
    return hidden


def _by_parts(forward: Layer, tokens: int) -> Layer:
    """`forward` over `[B, S, C]`, at most `tokens` of S at a time."""
    return lambda hidden: in_parts(lambda part: (forward(part),), tokens, hidden)[0]


def in_parts(forward: Callable[..., Outputs], tokens: int | None, *inputs: Tensor) -> Outputs:
    """`forward` over tensors `[B, S, C]`, at most `tokens` of S at a time, into tensors that are made once.

    `None` and 0 are all at once, as it is with gradients.
    """
    length = inputs[0].shape[1]
    if not tokens or torch.is_grad_enabled() or length <= tokens:
        return forward(*inputs)
    outputs: Any = None
    for first in range(0, length, tokens):
        parts = forward(*(each[:, first : first + tokens] for each in inputs))
        if outputs is None:
            outputs = tuple(part.new_empty(len(part), length, *part.shape[2:]) for part in parts)
        for output, part in zip(outputs, parts, strict=True):
            output[:, first : first + part.shape[1]] = part
    return outputs
