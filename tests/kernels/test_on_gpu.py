"""The kernels on a real card, against float64: values, gradients, and the ways in which torch calls them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layout_strategies import layouts
from test_attention import LAYOUTS, output_and_gradients
from torch.utils.checkpoint import checkpoint

from scale_dit.attention import attend
from scale_dit.benchmark.exact import window_rows
from scale_dit.grid import Grid
from scale_dit.layout import Layout

pytestmark = pytest.mark.gpu

LARGE = Layout(512, Grid(256, 256, 8), Grid(64, 64, 8), window=16)
"""One layer of FLUX.1 at 4096 px."""


@pytest.fixture(autouse=True)
def poison():
    """New memory holds NaN: what a kernel forgets to write is found."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


def streams(layout: Layout, dtype=torch.bfloat16, head_dim=64, batch=2, heads=3, sharpness=1.0, seed=0) -> tuple:
    """Text, image and guidance as slices of wider tensors with memory of their own behind each."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def stream(tokens: int, parts: int) -> tuple:
        packed = torch.randn(batch, tokens, parts, heads, head_dim, generator=generator, device="cuda")
        packed[:, :, : parts - 1] *= sharpness
        return tuple(part.requires_grad_() for part in packed.to(dtype).unbind(2))

    text = stream(layout.text, 3) if layout.text else None
    guidance = stream(layout.guidance_tokens, 2) if layout.guidance else None
    return text, stream(layout.image.tokens, 3), guidance


def in_double(inputs: tuple) -> tuple:
    return tuple(None if part is None else tuple(x.detach().double().requires_grad_() for x in part) for part in inputs)


def check(layout: Layout, inputs: tuple, scale: float | None = None) -> None:
    """No row's error is above twice that of masked attention's worst row in the same precision, plus rounding.

    Rounding is that of the numbers, and that of logits in float32. Gradients of queries and keys are differences of
    much larger numbers, and nothing where a row reads one key: errors are not compared with less than a thousandth of
    those. Where masked attention gives NaN, as for rows of one key in float16, nothing but rounding is allowed.
    """
    exact = output_and_gradients(in_double(inputs), layout, "reference", scale)
    ours = output_and_gradients(inputs, layout, "triton", scale)
    plain = output_and_gradients(inputs, layout, "masked", scale)
    query, key, value = (part.detach().double().norm(dim=-1).max() for part in inputs[1])
    factor = scale or inputs[1][0].shape[-1] ** -0.5
    largest, summands = float(query * key * factor), 1e-3 * float(query.maximum(key) * value * factor)
    floor = 2 * torch.finfo(inputs[1][0].dtype).eps + torch.finfo(torch.float32).eps * largest
    for part, (actual, peer, right) in enumerate(zip(ours, plain, exact, strict=True)):
        if not right.numel():
            continue
        typical = right.norm(dim=-1).square().mean().sqrt().clamp_min(summands if part > 1 else 1e-3)
        size = right.norm(dim=-1).clamp_min(typical / 2)
        error, allowed = (((each.double() - right).norm(dim=-1) / size).max() for each in (actual, peer))
        allowed = allowed.nan_to_num(0)
        assert error <= 2 * allowed + floor, f"tensor {part}: relative error {error:.1e}, masked has {allowed:.1e}"


@pytest.mark.parametrize("sharpness", [1.0, 8.0])
@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [(torch.bfloat16, 128), (torch.float16, 128), (torch.float16, 64), (torch.bfloat16, 32), (torch.float32, 32)],
)
@pytest.mark.parametrize("name", LAYOUTS)
def test_output_and_gradients_equal_float64(name, dtype, head_dim, sharpness):
    check(LAYOUTS[name], streams(LAYOUTS[name], dtype, head_dim, sharpness=sharpness), scale=0.2)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layouts(), st.sampled_from([1, 2]), st.sampled_from([1, 3]), st.sampled_from([1.0, 8.0]), st.integers(0, 99))
def test_random_layouts(layout, batch, heads, sharpness, seed):
    check(layout, streams(layout, torch.float16, 128, batch, heads, sharpness, seed))


@pytest.mark.parametrize("halo", [0, 8])
def test_a_layer_of_flux_at_2048_px_is_the_same_in_every_run(halo):
    layout = dataclasses.replace(LARGE, image=Grid(128, 128, 8), guidance=Grid(32, 32, 8), halo=halo)
    inputs = streams(layout, head_dim=128, batch=1, heads=24)
    first, second = (output_and_gradients(inputs, layout, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    peer = output_and_gradients(inputs, layout, "sdpa")
    for ours, theirs in zip(first, peer, strict=True):
        assert (ours.double() - theirs.double()).norm() <= 2e-2 * theirs.double().norm()


def test_heads_before_tokens():
    layout = LAYOUTS["ragged"]
    inputs = tuple(
        tuple(x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in part)
        for part in streams(layout, head_dim=128)
    )
    check(layout, inputs)


@pytest.mark.parametrize(("backend", "dynamic"), [("triton", False), ("triton", True), ("auto", False)])
def test_compiled_without_a_break(backend, dynamic):
    layout = dataclasses.replace(LAYOUTS["ragged"], image=Grid(39, 44, 4))  # more than `auto` takes another for
    inputs = streams(layout, head_dim=128)

    def double(text, image, guidance):
        return [2 * part for part in attend(text, image, guidance, layout, backend)]

    compiled = torch.compile(double, fullgraph=True, dynamic=dynamic)
    for eager, traced in zip(double(*inputs), compiled(*inputs), strict=True):
        torch.testing.assert_close(traced, eager)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs)[1], double(*inputs)[1])
    sum(part.float().square().sum() for part in compiled(*inputs)).backward()
    assert all(part.grad is not None for stream in inputs for part in stream)


def test_autocast_and_checkpointing():
    layout = LAYOUTS["square"]
    inputs = streams(layout, torch.float32, 64)
    leaves = [part for stream in inputs for part in stream]
    with torch.autocast("cuda", torch.bfloat16):
        outputs = attend(*inputs, layout, "triton")
        again = checkpoint(lambda *_: attend(*inputs, layout, "triton"), *leaves, use_reentrant=False)
    assert outputs[1].dtype == torch.bfloat16
    gradients = [torch.autograd.grad(sum(x.float().sum() for x in each), leaves) for each in (outputs, again)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert gradients[0][0].dtype == torch.float32


def test_a_cuda_graph_replays_on_new_values():
    layout = LAYOUTS["square"]
    inputs = streams(layout, head_dim=128)
    with torch.no_grad():
        attend(*inputs, layout, "triton")
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = attend(*inputs, layout, "triton")
        for stream, new in zip(inputs, streams(layout, head_dim=128, seed=1), strict=True):
            for part, values in zip(stream, new, strict=True):
                part.copy_(values)
        graph.replay()
        for replayed, direct in zip(outputs, attend(*inputs, layout, "triton"), strict=True):
            assert torch.equal(replayed, direct)


def test_a_new_size_compiles_nothing():
    from scale_dit_kernels import backward, backward_shared, forward, hopper, hopper_backward

    kernels = [
        forward._forward, forward._merge, backward_shared._prepare, backward._query_gradients, backward._key_gradients,
        backward_shared._add_parts, hopper._forward, hopper_backward.query_gradients, hopper_backward.key_gradients,
    ]  # fmt: skip

    def compiled() -> int:
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    sizes = [(Grid(40, 48, 8), 33), (Grid(25, 61, 8), 512), (Grid(16, 16, 8), 1)]
    counts = []
    for grid, text in sizes:
        layout = Layout(text, grid, Grid(grid.height // 4, grid.width // 4, 8), window=16, halo=8)
        output_and_gradients(streams(layout, head_dim=128), layout, "triton")
        counts.append(compiled())
    assert counts[0] == counts[-1], counts


def test_4096_px_needs_little_memory_beside_its_results():
    inputs = streams(LARGE, head_dim=128, batch=1, heads=24)
    with torch.no_grad():
        attend(*inputs, LARGE, "triton")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outputs = attend(*inputs, LARGE, "triton")
        torch.cuda.synchronize()
        results = sum(part.numel() * 2 for part in outputs) + 24 * (LARGE.text + LARGE.image.tokens) * 4
        assert torch.cuda.max_memory_allocated() - before - results < 64 * 2**20


@pytest.mark.slow
def test_addresses_beyond_two_thousand_million():
    """Packed queries, keys and values of 8192 px: the last window against float64."""
    layout = dataclasses.replace(LARGE, image=Grid(512, 512, 8), guidance=Grid(128, 128, 8))
    packed = torch.randn(1, layout.image.tokens, 3, 24, 128, device="cuda", dtype=torch.bfloat16)
    assert packed.numel() > 2**31
    text, _, guidance = streams(layout, head_dim=128, batch=1, heads=24)
    image = packed.unbind(2)
    with torch.no_grad():
        _, output = attend(text, image, guidance, layout, "triton")
    rows, right = window_rows(text, image, guidance, layout, group=-1, window=-1)
    assert (output[:, rows].double() - right).norm() < 5e-3 * right.norm()
