"""The one attention call: `attend(text, image, guidance, layout, backend)`.

A backend is a public module of this package, by its name. It offers

    unavailable(device, dtype) -> str | None
        why it cannot run there and what to do about it, or `None`;
    attend(text, image, guidance, layout, scale) -> (text_out, image_out)
        where `text` and `image` are (query, key, value) and `guidance` is (key, value), `[B, tokens, H, D]` each, and
        absent parts have no tokens.

Modules other than `triton` are imported when they are asked for;
a backend imports what it needs beside torch when it runs.
"""

from __future__ import annotations

import logging
import pkgutil
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from scale_dit.attention import triton
from scale_dit.errors import UserError
from scale_dit.layout import Layout

QueryKeyValue = tuple[Tensor, Tensor, Tensor]
KeyValue = tuple[Tensor, Tensor]

log = logging.getLogger(__name__)

SMALL_PICTURE = 1024
"""Image tokens up to which `auto` takes one masked attention."""


def attend(
    text: QueryKeyValue | None,
    image: QueryKeyValue,
    guidance: KeyValue | None,
    layout: Layout,
    backend: str = "auto",
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of text and image rows over the keys that `layout` lets them read.

    Args:
        text: query, key, value of the text tokens, `[B, T, H, D]` each, strided at will; `None` where T is 0.
        image: the same of the image tokens in memory order, `[B, N, H, D]`.
        guidance: key, value of the guidance tokens in memory order, `[B, L, H, D]`; `None` where L is 0.
        layout: who reads whom; its token counts must be those of the tensors.
        backend: a name from `backends()`, or `auto`.
        scale: factor of the logits, `D ** -0.5` by default.

    A compiled model traces backend `triton`, which is an operator of torch. The others are one break between its
    graphs: their geometry is looked up, not traced.

    Returns:
        Outputs of the text rows `[B, T, H, D]` and of the image rows `[B, N, H, D]`.

    Raises:
        UserError: if the backend is unknown or cannot run here.
        ValueError: if a tensor's token count is not the layout's.
    """
    text, guidance, scale = _complete(text, image, guidance, layout, scale)
    backend = resolve(backend, image[0].device, image[0].dtype, image[0].shape[-1], layout)
    if backend == "triton":
        return triton.attend(text, image, guidance, layout, scale)
    return _attend_eagerly(text, image, guidance, layout, backend, scale)


def attend_joined(
    text: QueryKeyValue | None,
    image: QueryKeyValue,
    guidance: KeyValue | None,
    layout: Layout,
    backend: str = "auto",
    scale: float | None = None,
) -> Tensor:
    """As `attend`, as one tensor `[B, T + N, H, D]`, text rows first; backend `triton` copies nothing for that."""
    text, guidance, scale = _complete(text, image, guidance, layout, scale)
    backend = resolve(backend, image[0].device, image[0].dtype, image[0].shape[-1], layout)
    if backend == "triton":
        return triton.attend_joined(text, image, guidance, layout, scale)
    return torch.cat(_attend_eagerly(text, image, guidance, layout, backend, scale), dim=1)


def _complete(
    text: QueryKeyValue | None, image: QueryKeyValue, guidance: KeyValue | None, layout: Layout, scale: float | None
) -> tuple[QueryKeyValue, KeyValue, float]:
    """Absent streams as such with no tokens, and the default scale; refuses tensors that the layout does not fit."""
    query = image[0]
    nothing = query[:, :0]
    text = text or (nothing, nothing, nothing)
    guidance = guidance or (nothing, nothing)
    for name, parts, tokens in (
        ("text", text, layout.text),
        ("image", image, layout.image.tokens),
        ("guidance", guidance, layout.guidance_tokens),
    ):
        if any(part.shape[1] != tokens for part in parts):
            shapes = ", ".join(str(list(part.shape)) for part in parts)
            raise ValueError(
                f"The layout has {tokens} {name} tokens, but the tensors are {shapes} ([B, tokens, H, D])."
            )
    return text, guidance, query.shape[-1] ** -0.5 if scale is None else scale


@torch.compiler.disable
def _attend_eagerly(
    text: QueryKeyValue, image: QueryKeyValue, guidance: KeyValue, layout: Layout, backend: str, scale: float
) -> tuple[Tensor, Tensor]:
    query = image[0]
    module = _module(backend)
    if problem := module.unavailable(query.device, query.dtype):
        raise UserError(f"Attention backend '{backend}' cannot run here: {problem}")
    return module.attend(text, image, guidance, layout, scale)


def backends() -> list[str]:
    """Names of all attention backends."""
    return sorted(name for _, name, _ in pkgutil.iter_modules(__path__) if not name.startswith("_"))


def resolve(backend: str, device: torch.device, dtype: torch.dtype, head_size: int, layout: Layout) -> str:
    """The backend that a name stands for: its own, or what `auto` takes for these inputs; under autocast, as cast."""
    if backend != "auto":
        return backend
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    backend, reason = choose_backend(device, dtype, head_size, layout)
    if not torch.compiler.is_compiling():
        _say(backend, reason)
    return backend


@cache
def _say(backend: str, reason: str) -> None:
    """Once for each choice."""
    log.info("attention: %s (%s); attention=<name> takes another", backend, reason)


def choose_backend(device: torch.device, dtype: torch.dtype, head_size: int, layout: Layout) -> tuple[str, str]:
    """The backend that `auto` takes for these inputs, and why."""
    if layout.image.tokens <= SMALL_PICTURE:
        return "masked", f"fastest up to {SMALL_PICTURE} image tokens: one call instead of one for each kind of window"
    if dtype in triton.FAST_DTYPES and head_size in triton.FAST_HEAD_SIZES and triton.has_fast_gpu(device):
        return "triton", "the fastest by experiments/kernel, and needs the least memory"
    return "sdpa", "reads what the windows hold and no more, on every device"


def avoid_failing_kernels(head_size: int) -> None:
    """Switch off cuDNN's attention for small heads, process-wide.

    It failed with an illegal memory access at 320 tokens and heads of 32 (torch 2.11, H100, bfloat16).
    """
    if head_size < 64:
        torch.backends.cuda.enable_cudnn_sdp(False)


def check_backend(name: str) -> None:
    """Refuse a name that is none.

    Raises:
        UserError: if it is neither `auto` nor one of `backends()`.
    """
    if name not in ("auto", *backends()):
        raise UserError(f"Unknown attention backend '{name}': use one of auto, {', '.join(backends())}.")


def _module(backend: str) -> ModuleType:
    check_backend(backend)
    return import_module(f"{__name__}.{backend}")
