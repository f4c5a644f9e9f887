"""What code would compute, move and hold in memory, found by running it on tensors without data (device `meta`).

The code that is traced is the code that runs later, so a plan cannot disagree with it: no formula has to be kept in
step with the models. Nothing is computed, so a 16K picture on a 12B model is traced in about a second.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.nn.functional import layer_norm, linear, mse_loss, rms_norm, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from scale_dit.layout import Layout
from scale_dit.planning.meta import on_meta, tensors_in

MATMUL = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"}
CONVOLUTION = {"aten::convolution"}
WINDOWED = "scale_dit::windowed_attention"
WIDEST = 256
"""Widest heads of torch's fused attention; there is other code for wider ones, at a rate of its own."""


class Operation(NamedTuple):
    """One kernel: what bounds it, its arithmetic, and the bytes that it reads and writes."""

    kind: str
    """`matmul`, `convolution`, `attention` (torch's), `windowed` (the project's kernel), `wide` (heads wider than
    `WIDEST`, such as an autoencoder's) or `elementwise`."""
    flops: float
    bytes: float


@dataclass
class Trace:
    """What a piece of code comes to.

    Attributes:
        operations: How often each operation runs.
        peak: Most bytes of tensors made inside that exist at a time.
        kept: Bytes of tensors made inside that exist at the end.
    """

    operations: Counter[Operation] = field(default_factory=Counter)
    peak: int = 0
    kept: int = 0

    def flops(self, *kinds: str) -> float:
        """Arithmetic of the given kinds, of all without any."""
        return sum(
            count * operation.flops
            for operation, count in self.operations.items()
            if not kinds or operation.kind in kinds
        )


def trace(
    code: Callable[[], object], device: str = "meta", gradients: bool = False, autocast: torch.dtype | None = None
) -> Trace:
    """Run code and note what it does. What it returns is kept.

    Args:
        device: Type of the device whose memory is counted; the code's tensors are there.
        gradients: Whether what a backward pass needs is kept.
        autocast: Precision of a GPU's autocast, which `meta` has none of.
    """
    found = Trace()
    casting = nullcontext() if autocast is None else _Autocast(autocast)
    with (
        torch.set_grad_enabled(gradients),
        _Attention(found),
        casting,
        _Operations(found, device) as operations,
    ):
        _ = code()
        found.kept = operations.live
    return found


def run_backward(loss: Tensor) -> None:
    """`loss.backward()`, inside of which what is recomputed is traced too.

    That method and `torch.autograd.backward` are functions of torch, in which no mode acts any more.
    """
    _engine_run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


class _Attention(TorchFunctionMode):
    """torch's attention as one operation: on `meta` it would become the textbook formula, with its S x S matrix."""

    def __init__(self, found: Trace):
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            found = signature(_streams).bind(*args, **kwargs).args[:3]
            if found[0].device.type == "meta":
                return self._attend(*found)
        return func(*args, **kwargs)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = _AttentionShapes.apply(query, key, value)
        flops = 2 * query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])
        moved = sum(map(_bytes, (query, key, value, output)))
        kind = "attention" if query.shape[-1] <= WIDEST else "wide"
        self.found.operations[Operation(kind, flops, moved)] += 1
        return output


class _AttentionShapes(torch.autograd.Function):
    """Attention on `meta`: what a fused kernel makes, and what it keeps for its backward pass."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query[..., :1].expand(*query.shape[:-1], value.shape[-1]))
        if any(ctx.needs_input_grad):
            log_sum = query.new_empty(query.shape[:-1], dtype=torch.float32)
            ctx.save_for_backward(query, key, value, output, log_sum)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(torch.empty_like, ctx.saved_tensors[:3]))


class _Autocast(TorchFunctionMode):
    """What CUDA's autocast does to the operations that the models consist of (ATen/autocast_mode.h)."""

    LOWER = (linear, scaled_dot_product_attention)
    FLOAT32 = (layer_norm, torch.layer_norm, rms_norm, torch.rms_norm, mse_loss)

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.cast: dict[Tensor, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        target = self.dtype if func in self.LOWER else torch.float32 if func in self.FLOAT32 else None
        if target is not None:
            args, kwargs = tree_map_only(Tensor, lambda tensor: self._as(tensor, target), (args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _as(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if not tensor.is_floating_point() or tensor.dtype == dtype:
            return tensor
        if not (tensor.is_leaf and tensor.requires_grad):
            return tensor.to(dtype)
        if tensor not in self.cast:  # trained weights are cast once
            self.cast[tensor] = tensor.to(dtype)
        return self.cast[tensor]


def _streams(query: Tensor, key: Tensor, value: Tensor, *others: object, **options: object) -> None:
    """How torch's attention is called."""


class _Operations(TorchDispatchMode):
    """Every operation that computes something, and the storages that are alive."""

    def __init__(self, found: Trace, device: str):
        super().__init__()
        self.found, self.device = found, device
        self.live = 0
        self.known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = on_meta(func, args, kwargs) if self.device == "meta" else func(*args, **kwargs)
        inputs, outputs = tensors_in((args, kwargs)), tensors_in(output)
        for tensor in inputs:  # unknown ones, such as weights, were there before
            self._note(tensor, is_new=False)
        for tensor in outputs:
            self._note(tensor, is_new=True)
        name = func._schema.name
        if not func.is_view and not name.startswith(("aten::empty", "aten::new_empty", "aten::detach")):
            flops, kind = _arithmetic(name, args, outputs)
            moved = sum(map(_bytes, inputs)) + sum(map(_bytes, outputs))
            self.found.operations[Operation(kind, flops, moved)] += 1
        return output

    def _note(self, tensor: Tensor, is_new: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if tensor.device.type != self.device or key in self.known:
            return
        size = storage.nbytes() if is_new else 0

        def forget(_: object) -> None:
            self.live -= size
            del self.known[key]

        self.known[key] = weakref.ref(storage, forget)
        self.live += size
        self.found.peak = max(self.found.peak, self.live)


def _arithmetic(name: str, args: Any, outputs: list[Tensor]) -> tuple[float, str]:
    """FLOPs of an operation and its kind."""
    if name in MATMUL:
        inner = args[1 if name in ("aten::addmm", "aten::baddbmm") else 0].shape[-1]
        return 2 * outputs[0].numel() * inner, "matmul"
    if name in CONVOLUTION:
        return 2 * outputs[0].numel() * args[1][0].numel(), "convolution"
    if name == WINDOWED:
        image_query, layout = args[3], Layout.from_json(args[8])
        return len(image_query) * layout.flops(*image_query.shape[2:]), "windowed"
    return 0, "elementwise"


def _bytes(tensor: Tensor) -> int:
    """Bytes of a tensor, of an expanded one those that exist."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
