"""Every Triton kernel without a GPU: right in the interpreter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from training_runs import command_environment

pytest.importorskip("triton")


@pytest.mark.slow
def test_kernels_equal_float64():
    """One process for all, whose imports take longer than most of them."""
    answer = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("interpreted.py"))],
        env=command_environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr[-2000:]
