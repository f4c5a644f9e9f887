"""What the benchmark trusts: exact rows, the gate in front of the clock, and clear refusals."""

from __future__ import annotations

import pytest
import torch
from test_attention import LAYOUTS, random_inputs

from scale_dit.attention import attend
from scale_dit.benchmark.attention import TOLERANCE, AttentionBenchmark, Case, gate, measures
from scale_dit.benchmark.exact import text_rows, window_rows
from scale_dit.benchmark.rotation import TOLERANCE as ROTATION_TOLERANCE
from scale_dit.benchmark.rotation import relative_error
from scale_dit.errors import UserError

SETTINGS = {
    "sizes": [1024], "patterns": ["disjoint"], "orders": ["window"], "backends": ["triton"], "passes": ["forward"],
    "rounds": 3, "longest_seconds": 1.0, "heads": 2, "head_dim": 16, "text": 3,
}  # fmt: skip


@pytest.fixture
def case() -> Case:
    layout = LAYOUTS["ragged"]
    return Case(layout, *random_inputs(layout))


def test_exact_rows_are_those_of_the_reference(case):
    text_out, image_out = attend(case.text, case.image, case.guidance, case.layout, "reference")
    for group in range(len(case.layout.groups())):
        rows, exact = window_rows(case.text, case.image, case.guidance, case.layout, group, -1)
        torch.testing.assert_close(image_out[:, rows], exact)
    torch.testing.assert_close(text_out[:, -4:, 1:2], text_rows(case.text, case.image, slice(-4, None), head=1))


def test_the_gate_lets_the_right_result_through_and_no_other(case):
    right = attend(case.text, case.image, case.guidance, case.layout, "reference")
    assert gate(case, right) < 1e-12
    last_window = case.layout.groups()[-1].queries[-1]
    for part, row in ((0, -1), (1, last_window[-1])):
        wrong = [output.clone() for output in right]
        wrong[part][:, row] *= 1.1
        assert gate(case, tuple(wrong)) > TOLERANCE
        wrong[part][:, row] = torch.nan
        assert not gate(case, tuple(wrong)) <= TOLERANCE


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"backends": ["fast"]}, "unknown backend 'fast': use one of .*triton.*dense_cudnn"),
        ({"patterns": ["paper"]}, "unknown pattern 'paper': use one of disjoint, official"),
        ({"passes": ["backward"]}, "unknown pass 'backward': use one of forward, forward_backward"),
    ],
)
def test_unknown_names_are_refused(setting, message):
    with pytest.raises(UserError, match=message):
        AttentionBenchmark(**{**SETTINGS, **setting})


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
def test_a_machine_without_a_gpu_is_told(tmp_path):
    with pytest.raises(UserError, match="needs a CUDA GPU"):
        AttentionBenchmark(**SETTINGS).run(tmp_path / "results.csv")


def test_errors_of_the_rotation_are_seen():
    right = torch.randn(2, 5, 3, 16)
    assert relative_error(right.bfloat16(), right) < ROTATION_TOLERANCE < relative_error(right * 1.1, right)
    assert not relative_error(right * torch.nan, right) <= ROTATION_TOLERANCE


def test_a_row_says_rate_and_share():
    row = measures([2.0, 1.0, 4.0], flops=1e12, gemm=1e15)
    assert (row["p50_ms"], row["tflops"], row["share_of_gemm"], row["rounds"]) == ("2.0000", "500.0", "0.500", 3)
