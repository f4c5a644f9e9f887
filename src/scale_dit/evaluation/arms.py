"""What the runner compares: arms, which turn prompts and seeds into pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from scale_dit.errors import UserError


@dataclass(frozen=True)
class ArmOutput:
    """A batch of pictures and what it cost.

    Args:
        images: `[B, 3, H, W]` float in [0, 1] or uint8, in the order of the prompts.
        seconds: wall-clock seconds of the whole batch, by stage (`draft`, `refine`, `decode`).
        peak_bytes: peak memory of the device, by stage.
        drafts: the native-size pictures `[B, 3, h, w]` that the pictures were made from, if there are any.
    """

    images: Tensor
    seconds: Mapping[str, float] = field(default_factory=dict)
    peak_bytes: Mapping[str, float] = field(default_factory=dict)
    drafts: Tensor | None = None


class Generator(Protocol):
    """Makes one picture per prompt; the same seed must give the same noise in every arm that has noise."""

    def __call__(self, prompts: list[str], seeds: list[int]) -> ArmOutput:
        """Pictures in the order of the prompts."""
        ...


@dataclass(frozen=True)
class Arm:
    """A generator and everything that decides what its pictures look like.

    Args:
        generate: makes the pictures.
        settings: plain values (base, LoRA file's digest, pattern, steps, size, ...). Pictures that lie on disk with the
            same settings, prompt and seed are taken instead of made again; without settings all are made anew.
    """

    generate: Generator
    settings: Mapping[str, Any] | None = None


def check_output(arm: str, output: ArmOutput, wanted: int) -> None:
    """Raises:
    UserError: the arm did not return one RGB picture (and draft) per prompt.
    """
    shape = tuple(output.images.shape)
    if len(shape) != 4 or shape[0] != wanted or shape[1] != 3:
        raise UserError(f"arm {arm!r} was asked for {wanted} pictures and returned a tensor {shape}, not [B, 3, H, W]")
    if output.drafts is not None and len(output.drafts) != wanted:
        raise UserError(f"arm {arm!r} was asked for {wanted} pictures and returned {len(output.drafts)} drafts")


def as_arms(arms: Mapping[str, Arm | Generator]) -> dict[str, Arm]:
    """Bare generators as arms without settings."""
    return {name: arm if isinstance(arm, Arm) else Arm(arm) for name, arm in arms.items()}


def chunks(indices: Sequence[int], size: int) -> list[list[int]]:
    """Consecutive lists of at most `size` indices."""
    return [list(indices[start : start + size]) for start in range(0, len(indices), size)]
