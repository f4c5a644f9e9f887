"""Exact attention of parts of a large layout, to check what cannot be checked whole."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from scale_dit.attention import attend
from scale_dit.layout import Layout

RUN = 64
"""Tokens whose error is looked at together."""


def window_rows(text: tuple, image: tuple, guidance: tuple, layout: Layout, group: int, window: int) -> tuple:
    """Image rows of one window, in float64.

    Args:
        text, image, guidance: streams as `scale_dit.attention.attend` takes them.
        layout: who reads whom.
        group, window: which of `layout.groups()`, and which of its windows.

    Returns:
        Places of the rows in memory `[n]`, and their exact output `[B, n, H, D]`.
    """
    queries, keys, drafts = (places[window].to(image[0].device) for places in layout.groups()[group])
    key, value = (
        torch.cat([text[part], image[part][:, keys], guidance[part - 1][:, drafts]], dim=1).double() for part in (1, 2)
    )
    return queries, _attention(image[0][:, queries], key, value)


def dense_rows(query: Tensor, text: tuple, image: tuple, head: int) -> Tensor:
    """What queries `[B, n, H, D]` of one head read from all text and image keys, in float64, `[B, n, 1, D]`."""
    heads = slice(head, head + 1)
    key, value = (torch.cat([text[part][:, :, heads], image[part][:, :, heads]], dim=1).double() for part in (1, 2))
    return _attention(query[:, :, heads], key, value)


def gradients_of_head(
    text: tuple, image: tuple, guidance: tuple, layout: Layout, upstream: Sequence[Tensor], head: int
) -> list[Tensor]:
    """Gradients of one head's queries, keys and values, of every stream in turn, float64 `[B, tokens, 1, D]`.

    They come from autograd through windows that are gathered one by one (backend `sdpa`), so that memory grows with
    the picture and not with its square.

    Args:
        text, image, guidance, layout: as `scale_dit.attention.attend` takes them.
        upstream: gradients of the outputs of the text rows and of the image rows, `[B, tokens, H, D]`.
        head: which.
    """

    def of_head(parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(part.detach()[:, :, head : head + 1].double() for part in parts)

    streams = [tuple(part.requires_grad_() for part in of_head(stream)) for stream in (text, image, guidance)]
    with torch.enable_grad():
        outputs = attend(streams[0], streams[1], streams[2], layout, "sdpa")  # type: ignore[arg-type]
        return list(torch.autograd.grad(outputs, [part for stream in streams for part in stream], of_head(upstream)))


def worst_run(actual: Tensor, right: Tensor) -> Tensor:
    """Largest relative error of `RUN` tokens that lie together, of tensors `[B, tokens, H, D]`: a scalar."""
    if not right.shape[1]:
        return right.new_zeros(())
    missing = -right.shape[1] % RUN

    def norms(tensor: Tensor) -> Tensor:
        runs = functional.pad(tensor, (0, 0, 0, 0, 0, missing)).unflatten(1, (-1, RUN))
        return runs.square().sum((2, 4)).sqrt()

    return (norms(actual.double() - right) / norms(right)).max()


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    logits = torch.einsum("bshd,bkhd->bhsk", query.double(), key) * query.shape[-1] ** -0.5
    return torch.einsum("bhsk,bkhd->bshd", logits.softmax(-1), value)
