"""Windows as a batch of small dense attentions through torch's `scaled_dot_product_attention`, on any device.

Windows that read equally many keys are gathered and attended together, a bounded number of bytes at a time.
No mask is ever passed: masked SDPA is slow, and wrong above 65,536 keys on one backend (pytorch#162588).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from scale_dit.attention._dense import dense, join, text_rows
from scale_dit.layout import Layout

GATHER_BYTES = {"cpu": 4 * 2**20}
"""Most bytes of gathered keys and values at a time, by device type; a single window may exceed it.

What a CPU's caches hold: fresh hundreds of MiB cost it more in page faults than the attention itself.
"""
DEFAULT_GATHER_BYTES = 256 * 2**20

MAX_BATCH = 65_535
"""SDPA's kernels lay the batch along a grid axis that stops here."""


class _Work(NamedTuple):
    """Windows of one group, as indices on the device."""

    queries: Tensor
    """Places among the image tokens, `[windows, query tokens]`."""
    first_query: int | None
    """Where the group's queries lie in memory, if they are one run of tokens: then a view will do."""
    keys: Tensor | None
    """Places in text | image | guidance, `[windows, key tokens]`; `None`: every window reads everything in order."""


class _Plan(NamedTuple):
    works: tuple[_Work, ...]
    restore: Tensor | None
    """Where each image token's output lies in the groups' outputs, `[N]`; `None`: in its place already."""


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Runs everywhere."""
    return None


def attend(text: tuple, image: tuple, guidance: tuple, layout: Layout, scale: float) -> tuple[Tensor, Tensor]:
    """See `scale_dit.attention`. Gradients are autograd's own; shared keys' gradients are summed in float32."""
    queries = image[0]
    key, value = (join(*parts) for parts in zip(text[1:], image[1:], guidance, strict=True))
    if layout.is_dense:
        output = dense(join(text[0], queries), key, value, scale)
        text_out, image_out = output.split([layout.text, layout.image.tokens], dim=1)
        return text_out, image_out

    text_out = text_rows(text[0], key, value, layout, scale)
    plan = _plan(layout, queries.device)
    pieces = [piece for work in plan.works for piece in _windows(queries, key, value, work, layout.text, scale)]
    image_out = torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0]
    return text_out, image_out if plan.restore is None else image_out.index_select(1, plan.restore)


def _windows(queries: Tensor, key: Tensor, value: Tensor, work: _Work, text: int, scale: float) -> list[Tensor]:
    """Outputs of one group of windows, `[B, windows * query tokens, H, D]` in all, chunk by chunk."""
    batch, tokens = len(key), key.shape[1] if work.keys is None else work.keys.shape[1]
    window_bytes = 2 * batch * tokens * key.shape[2:].numel() * key.element_size()
    budget = GATHER_BYTES.get(key.device.type, DEFAULT_GATHER_BYTES)
    chunk = max(1, min(budget // window_bytes, MAX_BATCH // batch))
    outputs = []
    for start in range(0, len(work.queries), chunk):
        places = work.queries[start : start + chunk]
        if work.first_query is None:
            query = queries.index_select(1, places.flatten())
        else:
            query = queries.narrow(1, work.first_query + start * places.shape[1], places.numel())
        if work.keys is None:
            keys, values = (part.unsqueeze(1).expand(-1, len(places), -1, -1, -1) for part in (key, value))
        else:
            index = work.keys[start : start + chunk]
            keys, values = _Gather.apply(key, index, text), _Gather.apply(value, index, text)
        # [B, windows, tokens, H, D] -> [B windows, tokens, H, D]
        query = query.unflatten(1, places.shape)
        output = dense(query.flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1), scale)
        outputs.append(output.unflatten(0, (batch, len(places))).flatten(1, 2))
    return outputs


class _Gather(torch.autograd.Function):
    """`source[:, index]`, of which the first `shared` columns of `index` are the same in every row.

    Many windows read one key. The backward pass sums their gradients in float32 and without atomics for the shared
    ones, where `index_select` would add them up in the dtype of the keys.
    """

    @staticmethod
    def forward(ctx, source: Tensor, index: Tensor, shared: int) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shared, ctx.shape, ctx.dtype = shared, source.shape, source.dtype
        return source.index_select(1, index.flatten()).unflatten(1, index.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (index,), shared = ctx.saved_tensors, ctx.shared
        precise = torch.promote_types(ctx.dtype, torch.float32)
        total = torch.zeros(ctx.shape, dtype=precise, device=gradient.device)
        total[:, :shared] = gradient[:, :, :shared].sum(1, dtype=precise)
        total.index_add_(1, index[:, shared:].flatten(), gradient[:, :, shared:].flatten(1, 2).to(precise))
        return total.to(ctx.dtype), None, None


@lru_cache(maxsize=32)
def _plan(layout: Layout, device: torch.device) -> _Plan:
    groups = layout.groups()
    image, guidance = layout.text, layout.text + layout.image.tokens
    everything = guidance + layout.guidance_tokens
    works = []
    for group in groups:
        text = torch.arange(layout.text).expand(len(group.keys), -1)
        keys = torch.cat([text, group.keys + image, group.guidance + guidance], dim=1)
        queries = group.queries.flatten()
        one_run = bool((queries == torch.arange(len(queries)) + queries[0]).all())
        works.append(
            _Work(
                group.queries.to(device),
                int(queries[0]) if one_run else None,
                keys.to(device) if keys.shape[1] < everything else None,
            )
        )
    produced = torch.cat([group.queries.flatten() for group in groups])
    in_place = bool((produced == torch.arange(len(produced))).all())
    return _Plan(tuple(works), None if in_place else produced.argsort().to(device))
