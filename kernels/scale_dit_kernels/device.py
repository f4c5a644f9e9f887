"""Where a tensor's operators run: as kernels on its GPU, in Triton's interpreter, or by the formula."""

from __future__ import annotations

import contextlib
import os
from contextlib import AbstractContextManager
from importlib.util import find_spec

import torch
from torch import Tensor

HAS_TRITON = find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def takes_kernels(tensor: Tensor) -> bool:
    """Whether kernels compute, and not the formula."""
    return tensor.is_cuda or INTERPRETED


def launching_on(tensor: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be that of the tensor."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
