"""Attention over windows, text and draft on a GPU: the kernel for the card at hand, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import import_module

import torch
from torch import Tensor

from scale_dit_kernels import backward as backward_kernels
from scale_dit_kernels import forward as forward_kernels
from scale_dit_kernels.device import launching_on
from scale_dit_kernels.schedule import Schedule

TILES = {2: ((64, 64), (64, 64)), 4: ((64, 32), (32, 32))}
"""Queries and keys of a tile in the forward and the backward pass, by the bytes of a number."""
HOPPER_TILES = (128, 64), (64, 64)

Plan = Callable[[int, int], Schedule]
"""The tiles of a layout, from the numbers of queries and keys of one. The same call gives the same object."""


def forward(
    text: Sequence[Tensor], image: Sequence[Tensor], guidance: Sequence[Tensor], plan: Plan, scale: float
) -> tuple[Tensor, Tensor]:
    """softmax(scale Q K^T) V over what a layout lets each row read.

    Args:
        text, image: query, key and value, `[B, tokens, H, D]`. The last dimension is contiguous, the others may have
            any strides, so streams can be slices of wider tensors; nothing is copied.
        guidance: key and value. Parts that a layout does not have come with no tokens.
        plan: of the layout.
        scale: factor of the logits, positive.

    Returns:
        Outputs `[B, T + N, H, D]`, text rows first, and the natural log-sum-exp of each row's logits, float32
        `[B, H, T + N]`. Rows that read nothing give 0 and -inf.

    Raises:
        ValueError: the last dimension is not contiguous, or the scale is not positive.
    """
    query = image[0]
    if not scale > 0:
        raise ValueError(f"the scale is {scale}, but it must be positive")
    with launching_on(query):
        if takes_hopper(*text, *image, *guidance):
            from scale_dit_kernels import hopper  # which not every Triton can read

            schedule = plan(*HOPPER_TILES[0])
            work = schedule.row_work(query.shape[0] * query.shape[2], multiprocessors(query.device))
            return hopper.forward(text, image, guidance, schedule, work, scale)
        return forward_kernels.forward(text, image, guidance, plan(*TILES[query.element_size()][0]), scale)


def backward(
    gradient: Tensor,
    output: Tensor,
    lse: Tensor,
    text: Sequence[Tensor],
    image: Sequence[Tensor],
    guidance: Sequence[Tensor],
    plan: Plan,
    scale: float,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Gradients of the text's and the image's query, key and value, and of the guidance's key and value.

    Args:
        gradient: of the output.
        output, lse: as `forward` gave them.
        text, image, guidance, plan, scale: as `forward` took them.
    """
    tokens = [text[0].shape[1], image[0].shape[1]]
    gradient = gradient if gradient.stride(-1) == 1 else gradient.contiguous()
    gradients, outputs = gradient.split(tokens, dim=1), output.split(tokens, dim=1)
    with launching_on(gradient):
        if takes_hopper(*text, *image, *guidance, *gradients):
            from scale_dit_kernels import hopper_backward

            by_rows, by_columns = (plan(*tile) for tile in HOPPER_TILES)
            programs = multiprocessors(gradient.device)
            return hopper_backward.backward(
                gradients, outputs, lse, text, image, guidance, by_rows, by_columns, programs, scale
            )
        schedule = plan(*TILES[gradient.element_size()][1])
        return backward_kernels.backward(gradients, outputs, lse, text, image, guidance, schedule, scale)


def multiprocessors(device: torch.device) -> int:
    """Of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def takes_hopper(*parts: Tensor) -> bool:
    """Whether the kernels for Hopper compute, and not the portable ones."""
    some = parts[-1]
    if not some.is_cuda or some.element_size() != 2 or some.shape[-1] < 32:
        return False
    is_hopper = torch.version.hip is None and torch.cuda.get_device_capability(some.device) == (9, 0)
    if not is_hopper or not has_gluon():
        return False
    # TMA wants addresses and strides in multiples of 16 bytes.
    return all(
        not part.data_ptr() % 16 and not any(step % 8 for step in part.stride()[:3]) for part in parts if part.numel()
    )


@lru_cache(maxsize=1)
def has_gluon() -> bool:
    """Whether this Triton has the language that the kernel for Hopper is written in."""
    try:
        import_module("triton.experimental.gluon.language.nvidia.hopper")
    except ImportError:
        return False
    return True
