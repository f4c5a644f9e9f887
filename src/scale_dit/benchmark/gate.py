"""What a contestant must get right before it is timed, against float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scale_dit.benchmark.contestants import DENSE, Case
from scale_dit.benchmark.exact import dense_rows, window_rows, worst_run

TOLERANCE = 6e-3
"""Relative error of outputs in bfloat16 that passes."""
GRADIENT_TOLERANCE = 1.5e-2
"""Relative error of 64 neighbours' gradients in bfloat16 that passes: some backends add up hundreds of parts in it."""


@dataclass(frozen=True)
class Errors:
    """Of what a contestant computed; `None`: not looked at."""

    outputs: float
    gradients: float | None

    @property
    def problem(self) -> str | None:
        """What is too wrong to be timed."""
        if not self.outputs <= TOLERANCE:  # also where it is no number
            return f"outputs are wrong by {self.outputs:.1e}"
        if self.gradients is not None and not self.gradients <= GRADIENT_TOLERANCE:
            return f"gradients are wrong by {self.gradients:.1e}"
        return None

    @property
    def columns(self) -> dict[str, str]:
        """For a table."""
        gradients = "" if self.gradients is None else f"{self.gradients:.1e}"
        return {"output_error": f"{self.outputs:.1e}", "gradient_error": gradients}


def errors(case: Case, name: str, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> Errors:
    """Errors of a contestant's outputs and, if there are any, gradients; those of dense attention are not looked at."""
    is_dense = name in DENSE
    by_gradient = gradient_error(case, name, gradients) if len(gradients) and not is_dense else None
    return Errors(output_error(case, outputs, is_dense), by_gradient)


@torch.no_grad()
def output_error(case: Case, outputs: Sequence[Tensor], is_dense: bool = False) -> float:
    """Largest relative error of three windows of every kind there is and of the last text rows.

    Of dense attention: of the last text rows and the last image rows.
    """
    if len(outputs) == 1:
        outputs = outputs[0].split([case.layout.text, case.layout.image.tokens], dim=1)
    last = case.image[0].shape[2] - 1
    found = [(outputs[0][:, -8:, -1:], dense_rows(case.text[0][:, -8:], case.text, case.image, last))]
    if is_dense:
        found.append((outputs[1][:, -8:, -1:], dense_rows(case.image[0][:, -8:], case.text, case.image, last)))
    else:
        for group, windows in enumerate(case.layout.groups()):
            for window in (0, len(windows.queries) // 2, -1):
                rows, right = window_rows(case.text, case.image, case.guidance, case.layout, group, window)
                found.append((outputs[1][:, rows], right))
    return float(torch.stack([(actual.double() - right).norm() / right.norm() for actual, right in found]).max())


@torch.no_grad()
def gradient_error(case: Case, name: str, gradients: Sequence[Tensor]) -> float:
    """Largest relative error of the gradients of 64 neighbours, of all tokens of the first and the last head.

    Every row and every column of the attention matrix is in it, so a tile that the backward pass leaves out or counts
    twice shows, at any size of picture.
    """
    found_errors = []
    for head, exact in case.exact_gradients.items():
        found = case.by_stream(name, [gradient[:, :, head : head + 1].double() for gradient in gradients])
        found_errors += [worst_run(actual, right) for actual, right in zip(found, exact, strict=True)]
    return float(torch.stack(found_errors).max())
