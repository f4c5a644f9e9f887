"""Where and in which precision to compute."""

from __future__ import annotations

import os

import torch

from scale_dit.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
PINNED = "pinned_use_cuda_host_register:True,pinned_num_register_threads:8"
"""Settings of torch's allocator: several threads pin host memory. An H100's host pins 7 GB/s so, and 1.6 without."""


def pin_with_threads() -> None:
    """Let several threads pin host memory, unless the user has settings for torch's allocator.

    It acts until memory is first pinned or taken on a GPU. Decoding 8192 x 8192 px in host memory pins 34 GB.
    """
    if not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        os.environ[ALLOCATOR_VARIABLES[0]] = PINNED


def choose_device(device: str = "auto", dtype: str = "auto") -> tuple[torch.device, torch.dtype]:
    """Device and dtype by name; `auto` is a GPU in bfloat16 if there is one, else the CPU in float32.

    Raises:
        UserError: Unknown, or not on this machine.
    """
    if dtype not in ("auto", *DTYPES):
        raise UserError(f"unknown dtype {dtype!r}: use one of auto, {', '.join(DTYPES)}")
    pin_with_threads()
    try:
        chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {device!r} is not to be had here ({reason}): use device=auto or device=cpu") from error
    default = torch.bfloat16 if chosen.type == "cuda" else torch.float32
    return chosen, DTYPES.get(dtype, default)
