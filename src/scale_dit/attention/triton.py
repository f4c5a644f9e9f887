"""The project's own kernels, as operators of torch: they visit the tiles that the layout holds, and no others.

`torch.ops.scale_dit.windowed_attention` takes tensors on any device: on a GPU the kernels of `scale_dit_kernels`,
elsewhere the reference. Compiled models call it without a break.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import torch
from scale_dit_kernels.device import HAS_TRITON, INTERPRETED, takes_kernels
from scale_dit_kernels.reference import masked_attention, masked_attention_backward
from scale_dit_kernels.schedule import GUIDANCE, IMAGE, TEXT, Schedule, TileLists, packed
from torch import Tensor

from scale_dit.errors import UserError
from scale_dit.grid import Grid
from scale_dit.layout import Layout

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD_SIZES = (16, 32, 64, 128)
FAST_DTYPES = (torch.float16, torch.bfloat16)
FAST_HEAD_SIZES = (32, 64, 128)
LONGEST, PARTS = 128, 9
"""Lists of up to LONGEST tiles are one program's. Longer ones, which are those of the text, are split, but into no more
than PARTS: what each leaves behind takes memory."""


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Triton compiles for GPUs, in the precisions of deep learning; its interpreter runs anywhere, slowly."""
    if not HAS_TRITON:
        return "Triton is not installed: pip install 'scale-dit[gpu]', or use 'sdpa'."
    if device.type not in ("cuda", "meta") and not INTERPRETED:  # on meta the shapes are worked out, nothing runs
        return f"the Triton kernel does not run on '{device.type}'; use 'sdpa'."
    if dtype not in DTYPES:
        return f"the Triton kernel does not compute in {dtype}; use 'reference' or 'sdpa'."
    return None


@torch.compiler.assume_constant_result
def has_fast_gpu(device: torch.device) -> bool:
    """Whether the kernels run on this device, and on a GPU that they are fast on: NVIDIA's, from Ampere."""
    if not HAS_TRITON or device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def attend(text: tuple, image: tuple, guidance: tuple, layout: Layout, scale: float) -> tuple[Tensor, Tensor]:
    """See `scale_dit.attention`."""
    text_out, image_out = attend_joined(text, image, guidance, layout, scale).split(
        [layout.text, layout.image.tokens], dim=1
    )
    return text_out, image_out


def attend_joined(text: tuple, image: tuple, guidance: tuple, layout: Layout, scale: float) -> Tensor:
    """See `scale_dit.attention.attend_joined`. Under autocast, inputs are cast to its precision.

    Raises:
        UserError: the kernels cannot run here, or not with this head size or scale.
    """
    query = image[0]
    if problem := unavailable(query.device, query.dtype):
        raise UserError(f"Attention backend 'triton' cannot run here: {problem}")
    if query.shape[-1] not in HEAD_SIZES:
        raise UserError(
            f"Attention backend 'triton' takes heads of {HEAD_SIZES}, but these have {query.shape[-1]}: use 'sdpa'."
        )
    if not scale > 0:
        raise UserError(f"The factor of the logits is {scale}, but backend 'triton' takes positive ones: use 'sdpa'.")
    parts = tuple(part if part.stride(-1) == 1 else part.contiguous() for part in (*text, *image, *guidance))
    if query.device.type != "meta" and torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        parts = tuple(part.to(dtype) for part in parts)
    joined, _ = windowed_attention(*parts, layout.json, scale)
    return joined


@torch.library.custom_op("scale_dit::windowed_attention", mutates_args=())
def windowed_attention(
    text_query: Tensor, text_key: Tensor, text_value: Tensor,
    image_query: Tensor, image_key: Tensor, image_value: Tensor,
    guidance_key: Tensor, guidance_value: Tensor, layout: str, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of text and image rows over the keys that a layout lets them read.

    Args:
        text_query, text_key, text_value: `[B, T, H, D]`; T may be 0.
        image_query, image_key, image_value: `[B, N, H, D]`, in memory order.
        guidance_key, guidance_value: `[B, L, H, D]`; L may be 0.
        layout: `Layout.json`.
        scale: factor of the logits.

    Returns:
        Outputs `[B, T + N, H, D]`, text rows first, and the log-sum-exp of all rows, float32 `[B, H, T + N]`.
    """
    streams = (text_query, text_key, text_value), (image_query, image_key, image_value), (guidance_key, guidance_value)
    geometry = Layout.from_json(layout)
    if not takes_kernels(image_query):
        return _by_reference(streams, geometry, scale)
    from scale_dit_kernels.attention import forward  # imports triton, which not every machine has

    return forward(*streams, _plan(geometry, image_query.device), scale)


@windowed_attention.register_fake
def _(text_query, text_key, text_value, image_query, image_key, image_value, guidance_key, guidance_value, layout,
      scale):  # fmt: skip
    batch, image_tokens, heads, head_dim = image_query.shape
    rows = text_query.shape[1] + image_tokens
    lse = image_query.new_empty(batch, heads, rows, dtype=torch.float32)
    return image_query.new_empty(batch, rows, heads, head_dim), lse


@torch.library.custom_op("scale_dit::windowed_attention_backward", mutates_args=())
def windowed_attention_backward(
    gradient: Tensor, output: Tensor, lse: Tensor,
    text_query: Tensor, text_key: Tensor, text_value: Tensor,
    image_query: Tensor, image_key: Tensor, image_value: Tensor,
    guidance_key: Tensor, guidance_value: Tensor, layout: str, scale: float,
) -> list[Tensor]:  # fmt: skip
    """Gradients of the eight tensors that `windowed_attention` takes, in their order, each contiguous."""
    streams = (text_query, text_key, text_value), (image_query, image_key, image_value), (guidance_key, guidance_value)
    geometry = Layout.from_json(layout)
    if not takes_kernels(image_query):
        query, key, value = _joined(streams)
        mask = geometry.dense_mask().to(query.device)
        found = masked_attention_backward(gradient, query, key, value, mask, scale)
        tokens = [geometry.text, geometry.image.tokens]
        by_query = found[0].to(query.dtype).split(tokens, dim=1)
        by_key, by_value = (each.to(query.dtype).split([*tokens, guidance_key.shape[1]], dim=1) for each in found[1:])
        flat = (by_query[0], by_key[0], by_value[0], by_query[1], by_key[1], by_value[1], by_key[2], by_value[2])
        return [each.clone(memory_format=torch.contiguous_format) for each in flat]
    from scale_dit_kernels.attention import backward

    plan = _plan(geometry, image_query.device)
    by_stream = backward(gradient, output, lse, *streams, plan, scale)
    return [part for stream in by_stream for part in stream]


@windowed_attention_backward.register_fake
def _(gradient, output, lse, text_query, text_key, text_value, image_query,
      image_key, image_value, guidance_key, guidance_value, layout, scale):  # fmt: skip
    parts = (text_query, text_key, text_value, image_query, image_key, image_value, guidance_key, guidance_value)
    return [part.new_empty(part.shape) for part in parts]


def _save(ctx, inputs: tuple, output: tuple) -> None:
    *parts, ctx.layout, ctx.scale = inputs
    ctx.save_for_backward(*output, *parts)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, gradient: Tensor, _: Tensor) -> tuple:
    found = windowed_attention_backward(gradient, *ctx.saved_tensors, ctx.layout, ctx.scale)
    return *found, None, None


windowed_attention.register_autograd(_backward, setup_context=_save)


def _joined(streams: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    text, image, guidance = streams
    key, value = (torch.cat([text[part], image[part], guidance[part - 1]], dim=1) for part in (1, 2))
    return torch.cat([text[0], image[0]], dim=1), key, value


def _by_reference(streams: Sequence[Sequence[Tensor]], layout: Layout, scale: float) -> tuple[Tensor, Tensor]:
    query, key, value = _joined(streams)
    output, log_sum = masked_attention(query, key, value, layout.dense_mask().to(query.device), scale)
    lse = log_sum.to(torch.float32).transpose(1, 2)
    return output.to(query.dtype).contiguous(), lse.clone(memory_format=torch.contiguous_format)


@lru_cache(maxsize=64)
def _plan(layout: Layout, device: torch.device) -> Callable[[int, int], Schedule]:
    """Schedules of a layout by the sides of a tile, always the same objects."""
    return partial(schedule, layout, device)


@lru_cache(maxsize=64)
def schedule(layout: Layout, device: torch.device, block_m: int, block_n: int, longest: int | None = None) -> Schedule:
    """What the kernels are told of a layout. Cached, read-only.

    A CUDA graph that reads it lives no longer than the cache keeps it: 64 layouts and tile shapes.
    """
    tokens = (layout.text, layout.image.tokens, layout.guidance_tokens)
    lists = _tile_lists(layout, block_m, block_n)
    longest = longest or max(LONGEST, -(-sum(tokens) // (block_n * PARTS)))
    reads = torch.cat([_bounds(layout, part) for part in ("keys", "guidance")])
    no_places = torch.zeros(1, dtype=torch.int32, device=device)
    return Schedule(
        block_m,
        block_n,
        tokens,
        lists,
        longest,
        reads[:, layout.image_order].to(device, torch.int32).contiguous(),
        _places(layout.image, layout.image_order).to(device),
        _places(layout.guidance, layout.guidance_order).to(device) if layout.guidance else no_places,
    )


def _tile_lists(layout: Layout, block_m: int, block_n: int) -> TileLists:
    """Every visited tile, packed: queries of text and image rows, and the keys that they read."""
    visits = layout.tiles(block_m, block_n)
    starts = [torch.arange(count) * block_n for count in visits.streams]
    keys = torch.cat([packed(stream, start) for stream, start in zip((TEXT, IMAGE, GUIDANCE), starts, strict=True)])
    read = sum(visits.streams[: 2 if layout.text_reads_image else 1])
    whole = torch.cat(
        [start + block_n <= tokens for start, tokens in zip(starts, (layout.text, layout.image.tokens), strict=False)]
    )
    text_queries = packed(TEXT, torch.arange(0, layout.text, block_m))
    return TileLists(
        torch.cat([text_queries.repeat_interleave(read), packed(IMAGE, visits.query * block_m)]),
        torch.cat([keys[:read].repeat(len(text_queries)), keys[visits.key]]),
        torch.cat([whole[:read].repeat(len(text_queries)), visits.is_full]),
    )


def _bounds(layout: Layout, part: str) -> Tensor:
    """First and last + 1 row and column that each image token reads, in raster order, int64 `[4, N]`."""
    height, width = layout.image.height, layout.image.width
    edges = []
    for spans in layout.axes:
        ranges = [getattr(span, part) for span in spans for _ in span.queries]
        edges.append(torch.tensor([[each.start, each.stop] for each in ranges]))
    rows, columns = edges
    grid = torch.empty(4, height, width, dtype=torch.long)
    grid[:2], grid[2:] = rows.T[:, :, None], columns.T[:, None, :]
    return grid.flatten(1)


def _places(grid: Grid, order: Tensor) -> Tensor:
    """Row and column of each token in memory order, `row * 65536 + column`."""
    return (order // grid.width * 65536 + order % grid.width).to(torch.int32)
