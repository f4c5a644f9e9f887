"""What the benchmark trusts: exact rows and gradients, the gate before the clock, the clock, and clear refusals."""

from __future__ import annotations

import dataclasses
import time
from functools import partial

import pytest
import torch
from test_attention import LAYOUTS, SQUARE, random_inputs
from test_joined_backends import WHOLE

from scale_dit.attention import attend, fa4
from scale_dit.attention._dense import dense
from scale_dit.benchmark.alone import attend_alone, cell_table, join_all, tiles_of_all_rows
from scale_dit.benchmark.attention import AttentionBenchmark
from scale_dit.benchmark.contestants import Case, Contestant
from scale_dit.benchmark.exact import dense_rows, window_rows, worst_run
from scale_dit.benchmark.gate import GRADIENT_TOLERANCE, TOLERANCE, Errors, errors, gradient_error, output_error
from scale_dit.benchmark.roofline import Card, Work, measures, work_of
from scale_dit.benchmark.rotation import TOLERANCE as ROTATION_TOLERANCE
from scale_dit.benchmark.rotation import relative_error
from scale_dit.benchmark.timing import Times, interleaved
from scale_dit.benchmark.wide import _by_way, check
from scale_dit.errors import UserError
from scale_dit.tiles import padded

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
    torch.testing.assert_close(text_out[:, -4:, 1:2], dense_rows(case.text[0][:, -4:], case.text, case.image, head=1))


def test_the_gate_lets_the_right_result_through_and_no_other(case):
    right = attend(case.text, case.image, case.guidance, case.layout, "reference")
    assert output_error(case, right) < 1e-12
    last_window = case.layout.groups()[-1].queries[-1]
    for part, row in ((0, -1), (1, last_window[-1])):
        wrong = [output.clone() for output in right]
        wrong[part][:, row] *= 1.1
        assert output_error(case, wrong) > TOLERANCE
        wrong[part][:, row] = torch.nan
        assert Errors(output_error(case, wrong), None).problem


def test_the_gate_looks_at_every_gradient(case):
    right = case.contestant("reference").run(with_gradients=True)[1]
    assert gradient_error(case, "reference", right) < 1e-10
    for part in range(len(right)):
        for head in (0, -1):
            wrong = [gradient.clone() for gradient in right]
            wrong[part][:, -3:, head] *= 1.2
            assert gradient_error(case, "reference", wrong) > GRADIENT_TOLERANCE
        wrong[part][0, 0, 0, 0] = torch.nan
        assert Errors(0.0, gradient_error(case, "reference", wrong)).problem == "gradients are wrong by nan"


def test_a_column_that_misses_one_tile_of_queries_is_seen():
    """The backward pass of one text tile's keys leaves out the queries of one window in 64."""
    layout = dataclasses.replace(SQUARE, text=64, image=dataclasses.replace(SQUARE.image, height=64, width=64))
    case = Case(layout, *random_inputs(layout))
    _, right = case.contestant("sdpa").run(with_gradients=True)
    upstream = case.upstream[1].clone()
    upstream[:, layout.groups()[0].queries[1]] = 0
    without = torch.autograd.grad(case.contestant("sdpa").forward(), case.text[1], (case.upstream[0], upstream))
    wrong = [right[0], *without, *right[2:]]
    assert gradient_error(case, "sdpa", right) < 1e-10
    assert gradient_error(case, "sdpa", wrong) > GRADIENT_TOLERANCE


def test_dense_attention_is_checked_as_such(case):
    query, key, value = case.joined_dense
    output = dense(query, key, value, query.shape[-1] ** -0.5)
    assert errors(case, "dense_cudnn", [output], []).outputs < 1e-12
    wrong = output.clone()
    wrong[:, -1] = 0
    assert errors(case, "dense_cudnn", [wrong], []).problem


def test_gradients_of_joined_streams_come_apart_right(case):
    """Whatever a kernel does with joined streams: here the reference reads slices of them."""
    layout, joined = case.layout, case.joined
    scale = joined.query.shape[-1] ** -0.5
    sizes = [layout.text, layout.image.tokens, layout.guidance_tokens]

    def forward() -> tuple:
        keys, values = (
            [part[:, :tokens] for part, tokens in zip(whole.split([*map(padded, sizes)], dim=1), sizes, strict=True)]
            for whole in (joined.key, joined.value)
        )
        query = joined.query[:, : layout.image.tokens]
        text, image = ((each, keys[place], values[place]) for place, each in enumerate((case.text[0], query)))
        _, image_out = attend(text, image, (keys[2], values[2]), layout, "reference")
        return dense(joined.text_query, joined.text_key, joined.text_value, scale), image_out

    contestant = Contestant(forward, joined, lambda: case.upstream)
    outputs, gradients = contestant.run(with_gradients=True)
    assert output_error(case, outputs) < 1e-12
    assert gradient_error(case, "flex_joined", gradients) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("side", [64, 128])
@torch.no_grad()
def test_flex_alone_does_the_text_rows_too(side):
    """With and without masks."""
    case = Case(WHOLE, *random_inputs(WHOLE, torch.float32))
    rows = join_all(case.text, case.image, case.guidance)
    assert output_error(case, attend_alone("flex_alone", rows, WHOLE, side)) < 1e-5


def test_tiles_and_cells_of_all_rows_are_the_mask():
    mask = WHOLE.dense_mask()
    cells = cell_table(WHOLE).bool().repeat_interleave(64, 0).repeat_interleave(64, 1)
    assert torch.equal(cells, mask)
    tiles = tiles_of_all_rows(WHOLE, 128)
    pieces = mask.unfold(0, 128, 128).unfold(1, 128, 128).flatten(2)
    assert torch.equal(tiles.visited, pieces.any(2))
    assert torch.equal(tiles.full, pieces.all(2))
    with pytest.raises(UserError, match="only streams of multiples of 128 tokens are timed"):
        tiles_of_all_rows(dataclasses.replace(WHOLE, text=64), 128)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["flex_alone", "fa4_alone"])
def test_libraries_alone_pass_the_gate(name):
    if name == "fa4_alone" and fa4.unavailable(torch.device("cuda"), torch.bfloat16):
        pytest.skip("needs flash-attn-4 and a GPU that it has kernels for")
    case = Case(WHOLE, *random_inputs(WHOLE, torch.bfloat16, head_dim=64, device="cuda"))
    assert errors(case, name, *case.contestant(name).run(with_gradients=True)).problem is None


def test_errors_of_neighbours_are_not_drowned_by_the_rest():
    right = torch.randn(1, 640, 1, 16, dtype=torch.float64)
    wrong = right.clone()
    wrong[:, 128:192] *= 1.5
    assert worst_run(wrong, right) == pytest.approx(0.5)
    assert worst_run(right[:, :0], right[:, :0]) == 0


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"backends": ["fast"]}, "unknown backend 'fast': use one of .*triton.*flex_joined.*dense_cudnn"),
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


def test_work_counts_what_is_read_and_written_once():
    rows, keys, width = 5 + 256, 5 + 256 + 64, 2 * 3 * 8  # bytes of one token: bfloat16, 3 heads of 8
    forward = work_of(SQUARE, 3, 8, is_dense=False, with_gradients=False)
    assert forward.flops == SQUARE.flops(3, 8)
    assert forward.bytes == 2 * width * (rows + keys) + 4 * 3 * rows
    both = work_of(SQUARE, 3, 8, is_dense=False, with_gradients=True)
    assert both.flops == 3.5 * forward.flops
    assert both.bytes - forward.bytes == 4 * width * (rows + keys) + 4 * 3 * rows
    dense_work = work_of(SQUARE, 3, 8, is_dense=True, with_gradients=False)
    assert dense_work.flops == 4 * rows**2 * 3 * 8
    assert dense_work.bytes == 4 * width * rows + 4 * 3 * rows


def test_a_row_says_rates_and_what_the_card_could_do():
    times = Times([2.0, 1.0, 4.0], [0.1, 0.3, 0.2])
    row = measures(times, Work(flops=1e12, bytes=2e9), Card(flops=1e15, bytes=1e12))
    assert (row["p50_ms"], row["host_ms"], row["rounds"]) == ("2.0000", "0.2000", 3)
    assert (row["tflops"], row["share_of_gemm"], row["flop_per_byte"]) == ("500.0", "0.500", "500")
    assert row["roofline_ms"] == "2.0000"  # the bytes
    assert Work(flops=1e13, bytes=2e9).least_ms(Card(flops=1e15, bytes=1e12)) == pytest.approx(10)


@pytest.mark.gpu
def test_the_clock_does_not_count_pythons_time():
    data = torch.zeros(1024, device="cuda")

    def slow_to_launch() -> None:
        data.add_(1)
        time.sleep(0.01)
        data.add_(1)

    times = interleaved({"slow": slow_to_launch}, rounds=5)["slow"]
    assert max(times.device) < 1
    assert min(times.host) > 9


@pytest.mark.gpu
def test_a_call_that_takes_long_is_stopped():
    times = interleaved({"long": lambda: torch.cuda._sleep(10**8), "short": lambda: None}, 10, longest_seconds=0.1)
    assert len(times["long"].device) < 5
    assert len(times["short"].device) == 10


def test_wide_attention_that_is_wrong_is_not_timed():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(count, 16, generator=generator) for count in (80, 90, 90))
    check("torch", partial(_by_way, way="torch"), query, key, value)
    with pytest.raises(UserError, match=r"over 90 keys half differs .*: nothing is timed"):
        check("half", lambda *parts: _by_way(*parts, way="torch") / 2, query, key, value)
