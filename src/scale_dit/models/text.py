"""Encoded prompts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Text:
    """Encoded prompts: `tokens` `[B, T, C]` and `pooled` `[B, P]`."""

    tokens: Tensor
    pooled: Tensor

    def __getitem__(self, rows: slice) -> Text:
        return Text(self.tokens[rows], self.pooled[rows])

    def to(self, device: torch.device | str) -> Text:
        """The same on another device."""
        return Text(self.tokens.to(device), self.pooled.to(device))
