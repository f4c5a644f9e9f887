"""The loss of a training step, on tokens: what `ScaleDiTModule` minimises and the memory plan traces."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scale_dit.method import Plan
from scale_dit.models.text import Text
from scale_dit.sampling import add_noise


def flow_matching_loss(
    base: Any,
    plan: Plan,
    clean: Tensor,
    draft: Tensor | None,
    text: Text,
    seen_text: Text,
    noise: Tensor,
    time: Tensor,
    guidance_scale: float,
) -> Tensor:
    """x_t = (1-t) x_0 + t eps, target eps - x_0: mean squared error on the image tokens, which read the clean draft.

    Args:
        base: A driver.
        clean, noise: x_0 and eps, `[B, N, 4C]` float32, in the memory order of `plan`.
        draft: `[B, L, 4C]` float32; `None` for a plan without guidance.
        text: The captions. The pooled prompt that the draft is read with stays the picture's, as in sampling, where
            both branches read the same draft.
        seen_text: What the image pass sees of them.
        time: t, `[B]` float32.
        guidance_scale: Embedded guidance scale of a distilled base.
    """
    keys_values = base.guidance_pass(draft, text.pooled, plan, guidance_scale) if draft is not None else None
    noisy = add_noise(clean, noise, time.view(-1, 1, 1))
    velocity = base.image_pass(noisy, seen_text, time, plan, keys_values, guidance_scale)
    return torch.nn.functional.mse_loss(velocity.float(), noise - clean)
