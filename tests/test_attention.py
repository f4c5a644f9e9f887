"""Every backend against the float64 reference, and the reference against the textbook."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from layout_strategies import layouts
from scale_dit_kernels.reference import masked_attention
from torch.nn import functional

from scale_dit import attention
from scale_dit.attention import attend, backends, choose_backend
from scale_dit.attention import sdpa as sdpa_backend
from scale_dit.errors import UserError
from scale_dit.grid import Grid
from scale_dit.layout import Layout

HEADS, HEAD_DIM = 3, 8
SQUARE = Layout(5, Grid(16, 16, 4), Grid(8, 8, 4), window=8, halo=4)
LAYOUTS = {
    "square": SQUARE,
    "disjoint": dataclasses.replace(SQUARE, halo=0),
    "shifted": dataclasses.replace(SQUARE, shift=4),
    "global": dataclasses.replace(SQUARE, scope="global"),
    "text does not read": dataclasses.replace(SQUARE, text_reads_image=False),
    "no guidance": dataclasses.replace(SQUARE, guidance=None),
    "no text": dataclasses.replace(SQUARE, text=0),
    "hilbert": dataclasses.replace(SQUARE, order="hilbert"),
    "raster": dataclasses.replace(SQUARE, order="raster"),
    "one window": dataclasses.replace(SQUARE, window=None, halo=0),
    "dense": Layout(5, Grid(9, 7, 2)),
    "ragged": Layout(7, Grid(13, 22, 4), Grid(3, 6, 4), window=8, halo=4, shift=4, order="hilbert"),
    "odd": Layout(1, Grid(11, 5, 2), Grid(5, 3, 2), window=4, halo=2),
    "guidance pass": Layout.for_guidance(Grid(9, 6, 2)),
}


def random_inputs(
    layout: Layout,
    dtype: torch.dtype = torch.float64,
    sharpness: float = 1.0,
    head_dim: int = HEAD_DIM,
    device: str = "cpu",
) -> tuple:
    """Text, image and guidance streams as slices of wider tensors, so that no backend may count on their strides."""
    generator = torch.Generator().manual_seed(0)

    def stream(tokens: int, parts: int) -> tuple:
        packed = torch.randn(2, tokens, parts, HEADS, head_dim, generator=generator, dtype=torch.float64)
        packed[:, :, : parts - 1] *= sharpness
        return tuple(part.requires_grad_() for part in packed.to(device, dtype).unbind(2))

    text = stream(layout.text, 3) if layout.text else None
    guidance = stream(layout.guidance_tokens, 2) if layout.guidance else None
    return text, stream(layout.image.tokens, 3), guidance


def output_and_gradients(inputs: tuple, layout: Layout, backend: str, scale: float | None = None) -> list[torch.Tensor]:
    """Both outputs and the gradients of every input, of a loss that weighs every output differently."""
    outputs = attend(*inputs, layout, backend, scale)
    loss = sum(
        (output * torch.arange(output.numel(), device=output.device).mul(0.7).cos().view_as(output)).sum()
        for output in outputs
    )
    leaves = [part for stream in inputs if stream for part in stream]
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [*outputs, *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True))]


def test_the_reference_is_torchs_own_masked_attention():
    query, key, value = (torch.randn(2, tokens, HEADS, HEAD_DIM, dtype=torch.float64) for tokens in (6, 9, 9))
    mask = torch.rand(6, 9) < 0.5
    mask[:, 0] = True
    output, log_sum = masked_attention(query, key, value, mask, scale=0.3)
    by_head = [part.transpose(1, 2) for part in (query, key, value)]
    expected = functional.scaled_dot_product_attention(*by_head, attn_mask=mask, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(output, expected)
    logits = torch.einsum("bshd,bkhd->bshk", query, key) * 0.3
    torch.testing.assert_close(log_sum, (logits.exp() * mask[None, :, None]).sum(-1).log())


def test_a_row_that_reads_nothing_gives_zero_and_finite_gradients():
    query, key, value = (torch.randn(1, 3, 1, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])
    output, log_sum = masked_attention(query, key, value, mask)
    assert output[:, 1].eq(0).all()
    assert log_sum[:, 1].eq(-math.inf).all()
    for gradient in torch.autograd.grad(output.sum() + log_sum[:, [0, 2]].sum(), (query, key, value)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("backend", ["sdpa", "masked"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_equal_the_reference(name, backend):
    layout = LAYOUTS[name]
    inputs = random_inputs(layout)
    expected = output_and_gradients(inputs, layout, "reference")
    for actual, wanted in zip(output_and_gradients(inputs, layout, backend), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-11)


@settings(deadline=None, max_examples=60)
@given(layouts())
def test_random_layouts_equal_the_reference(layout):
    inputs = random_inputs(layout)
    expected = output_and_gradients(inputs, layout, "reference")
    for backend in ("sdpa", "masked"):
        for actual, wanted in zip(output_and_gradients(inputs, layout, backend), expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("sharpness", [1.0, 8.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["square", "ragged", "global"])
def test_sdpa_rounds_no_worse_than_masked_attention_in_the_same_dtype(name, dtype, sharpness):
    """Error against float64 at most twice that of torch's masked SDPA, plus a rounding floor (flash-attn's rule).

    Queries and keys times 8 make logits so large that scaling the keys before the product would show.
    """
    layout = LAYOUTS[name]
    inputs = random_inputs(layout, dtype, sharpness)
    exact = output_and_gradients(inputs, layout, "reference")
    plain = masked_sdpa_and_gradients(inputs, layout)
    for actual, peer, wanted in zip(output_and_gradients(inputs, layout, "sdpa"), plain, exact, strict=True):
        floor = torch.finfo(dtype).eps * wanted.abs().max()
        assert actual.isfinite().all()
        assert (actual - wanted).abs().max() <= 2 * (peer - wanted).abs().max() + floor


def masked_sdpa_and_gradients(inputs: tuple, layout: Layout) -> list[torch.Tensor]:
    """As `output_and_gradients`, by one masked SDPA over everything."""
    text, image, guidance = inputs
    query = torch.cat([text[0], image[0]], dim=1).transpose(1, 2)
    key, value = (torch.cat([text[i + 1], image[i + 1], guidance[i]], dim=1).transpose(1, 2) for i in (0, 1))
    output = functional.scaled_dot_product_attention(query, key, value, attn_mask=layout.dense_mask()).transpose(1, 2)
    outputs = output.split([layout.text, layout.image.tokens], dim=1)
    loss = sum((part * torch.linspace(-1, 1, part.numel()).view_as(part)).sum() for part in outputs)
    return [*outputs, *torch.autograd.grad(loss, [*text, *image, *guidance])]


def test_chunks_do_not_change_the_result(monkeypatch):
    inputs = random_inputs(SQUARE)
    whole = output_and_gradients(inputs, SQUARE, "sdpa")
    monkeypatch.setattr(sdpa_backend, "GATHER_BYTES", {"cpu": 1})
    for actual, wanted in zip(output_and_gradients(inputs, SQUARE, "sdpa"), whole, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", ["reference", "sdpa", "masked"])
def test_one_window_without_guidance_is_plain_attention(backend):
    layout = LAYOUTS["dense"]
    text, image, _ = random_inputs(layout)
    joint = [torch.cat(parts, dim=1).transpose(1, 2) for parts in zip(text, image, strict=True)]
    expected = functional.scaled_dot_product_attention(*joint).transpose(1, 2)
    torch.testing.assert_close(torch.cat(attend(text, image, None, layout, backend), dim=1), expected)


def test_the_memory_order_does_not_change_the_picture():
    results = []
    raster = LAYOUTS["ragged"]
    text, image, guidance = random_inputs(raster)
    for order in ("raster", "window", "hilbert"):
        layout = dataclasses.replace(raster, order=order)
        ordered_image = tuple(part[:, layout.image_order] for part in image)
        ordered_guidance = tuple(part[:, layout.guidance_order] for part in guidance)
        text_out, image_out = attend(text, ordered_image, ordered_guidance, layout, "sdpa")
        results.append(torch.cat([text_out, image_out[:, layout.image_order.argsort()]], dim=1))
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])


def test_the_scale_is_respected():
    text, image, guidance = random_inputs(SQUARE)
    doubled = [(2 * stream[0], *stream[1:]) for stream in (text, image)]
    expected = attend(*doubled, guidance, SQUARE, "reference")
    for backend in ("reference", "sdpa", "masked"):
        actual = attend(text, image, guidance, SQUARE, backend, scale=2 * HEAD_DIM**-0.5)
        torch.testing.assert_close(actual, expected)


def test_a_compiled_caller_gets_the_same():
    text, image, guidance = random_inputs(SQUARE, torch.float32)

    def block(text, image, guidance):
        text_out, image_out = attend(text, image, guidance, SQUARE)
        return text_out.sin(), image_out.cos()

    compiled = torch.compile(block, backend="aot_eager")(text, image, guidance)
    torch.testing.assert_close(compiled, block(text, image, guidance))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ragged", "one window", "guidance pass"])  # each is compiled for seconds
@torch.no_grad()
def test_flex_equals_the_reference(name):
    layout = LAYOUTS[name]
    inputs = random_inputs(layout, torch.float32)
    for actual, wanted in zip(attend(*inputs, layout, "flex"), attend(*inputs, layout, "reference"), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=2e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["square", "ragged", "guidance pass"])
@pytest.mark.parametrize("backend", ["sdpa", "masked", "flex"])
def test_gradients_on_a_gpu_equal_the_reference(backend, name):
    layout = LAYOUTS[name]
    inputs = random_inputs(layout, torch.float32, head_dim=32, device="cuda")
    expected = output_and_gradients(inputs, layout, "reference")
    for actual, wanted in zip(output_and_gradients(inputs, layout, backend), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=2e-5)


def test_flex_says_that_it_has_no_gradient_on_a_cpu():
    with pytest.raises(UserError, match="'flex' has no gradient on a CPU: use 'sdpa'"):
        attend(*random_inputs(SQUARE, torch.float32), SQUARE, "flex")


def test_flex_refuses_dtypes_that_it_would_not_run():
    with pytest.raises(UserError, match=r"'flex' cannot run here.*float64"):
        attend(*random_inputs(SQUARE), SQUARE, "flex")


@pytest.mark.parametrize(
    ("side", "dtype", "head_size", "has_gpu", "expected"),
    [
        (16, torch.float32, 128, False, "masked"),
        (64, torch.float32, 128, False, "sdpa"),
        (16, torch.bfloat16, 128, True, "masked"),
        (64, torch.bfloat16, 128, True, "triton"),
        (64, torch.float32, 128, True, "sdpa"),
        (64, torch.float16, 80, True, "sdpa"),
    ],
)
def test_auto_takes_the_fastest_exact_backend_and_says_why(side, dtype, head_size, has_gpu, expected, monkeypatch):
    monkeypatch.setattr(attention.triton, "has_fast_gpu", lambda device: has_gpu)
    layout = dataclasses.replace(SQUARE, image=Grid(side, side, 4))
    backend, reason = choose_backend(torch.device("cpu"), dtype, head_size, layout)
    assert backend == expected
    assert backend in backends()
    assert reason


def test_auto_says_once_what_it_took_and_why(caplog):
    attention._say.cache_clear()
    with caplog.at_level("INFO", logger="scale_dit.attention"):
        for _ in range(2):
            attend(*random_inputs(SQUARE), SQUARE)
    assert [record.message for record in caplog.records] == [
        "attention: masked (fastest up to 1024 image tokens: one call instead of one for each kind of window); "
        "attention=<name> takes another"
    ]


def test_a_mask_that_would_fill_the_memory_is_refused():
    layout = Layout(0, Grid(128, 136, 4), window=8)
    image = tuple(torch.zeros(1, layout.image.tokens, 1, 8) for _ in range(3))
    with pytest.raises(UserError, match=r"up to 16384 keys, but this one has 17408: use attention=auto"):
        attend(None, image, None, layout, "masked")


def test_unknown_backends_name_the_known():
    with pytest.raises(UserError, match=r"'flash'.*auto, fa4, flex, masked, reference, sdpa, triton"):
        attend(*random_inputs(SQUARE), SQUARE, "flash")


def test_tensors_of_another_layout_are_refused():
    text, image, guidance = random_inputs(SQUARE)
    with pytest.raises(ValueError, match="256 image tokens"):
        attend(text, tuple(part[:, :-1] for part in image), guidance, SQUARE)
    with pytest.raises(ValueError, match="64 guidance tokens"):
        attend(text, image, None, SQUARE)
