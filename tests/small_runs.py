"""Small generation runs: what they make, where they are stopped, and what came of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from scale_dit.generation import Picture, Sampling
from scale_dit.local_control import WindowPrompt
from scale_dit.method import Method
from scale_dit.picture_files import load_picture

METHOD = Method(order="hilbert")
PICTURES = [Picture(index, "a large red circle on sand", "", index, 128, 256) for index in range(4)]
SAMPLING = Sampling(steps=4, draft_steps=2)

LARGE = Picture(0, "a large red circle on sand", "", 0, 256, 512)
"""Of several windows."""
SAMPLING_OF_LARGE = Sampling(steps=3, draft_steps=2)
STAR = WindowPrompt((0, 0, 64, 64), "a small blue star on grass")

BLOCK = "FluxTransformerBlock"
CALLS_OF_STEP = 2 * 2
"""Blocks and branches."""
CALLS_OF_DRAFT = 2 * CALLS_OF_STEP
CALLS_OF_GUIDANCE = 2


class Stop:
    """Raises an error in a call of a module of one class, through a hook of torch."""

    def __init__(self, module: str, call: int, error: BaseException):
        self.module, self.left, self.error = module, call, error

    def __call__(self, module: nn.Module, arguments: object) -> None:
        if type(module).__name__ == self.module and not next(module.parameters()).is_meta:  # plans run on `meta`
            self.left -= 1
            if self.left == 0:
                raise self.error

    def __enter__(self):
        self.handle = register_module_forward_pre_hook(self)

    def __exit__(self, *error: object):
        self.handle.remove()


def changed(before: Path, after: Path) -> np.ndarray:
    """Where two pictures differ, `[H, W]`."""
    return (load_picture(before) != load_picture(after)).any(0).numpy()
