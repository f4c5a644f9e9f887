"""Exact attention of a few rows of a large layout, to check what cannot be checked whole."""

from __future__ import annotations

import torch
from torch import Tensor

from scale_dit.layout import Layout


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


def text_rows(text: tuple, image: tuple, rows: slice, head: int) -> Tensor:
    """Text rows of one head over all text and image keys, in float64, `[B, n, 1, D]`."""
    key, value = (
        torch.cat([text[part][:, :, head : head + 1], image[part][:, :, head : head + 1]], dim=1).double()
        for part in (1, 2)
    )
    return _attention(text[0][:, rows, head : head + 1], key, value)


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    logits = torch.einsum("bshd,bkhd->bhsk", query.double(), key) * query.shape[-1] ** -0.5
    return torch.einsum("bhsk,bkhd->bshd", logits.softmax(-1), value)
