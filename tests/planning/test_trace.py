"""Traces against memory that is really allocated, against counted FLOPs and against a measured peak."""

from __future__ import annotations

import pytest
import torch
from full_size import flux1_dev
from small_bases import drive, flux, noise, random_text
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from scale_dit.method import Method
from scale_dit.planning.trace import trace

GIB = 2**30


def test_peak_and_kept_of_known_code():
    def code() -> torch.Tensor:
        first = torch.empty(1000, device="meta")
        second = first * 2
        del first
        third = torch.cat([second, second])
        return third.view(2, 1000)[:1]

    found = trace(code)
    assert found.peak == 4 * 3000, "the first is gone when the third is made"
    assert found.kept == 4 * 2000, "a view keeps its whole storage"


def test_weights_do_not_count_but_their_reads_do():
    layer = torch.nn.Linear(8, 16, device="meta")
    given = torch.empty(4, 8, device="meta")
    found = trace(lambda: layer(given))
    assert found.peak == 4 * 4 * 16
    (operation,) = found.operations
    assert (operation.kind, operation.flops) == ("matmul", 2 * 4 * 8 * 16)
    assert operation.bytes == 4 * (4 * 8 + 8 * 16 + 16 + 4 * 16)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_arithmetic_is_what_torch_counts(device):
    def code() -> None:
        picture = torch.zeros(2, 3, 9, 9, device=device)
        found = functional.conv2d(picture, torch.zeros(5, 3, 3, 3, device=device), stride=2, padding=1)
        torch.bmm(found.flatten(2), found.flatten(2).mT)

    counter = FlopCounterMode(display=False)
    with counter:
        code()
    assert trace(code, device).flops() == counter.get_total_flops()


def test_an_operation_that_is_known_gives_what_torch_gives():
    """Views of its inputs, numbers of another type, several outputs, inputs of other strides or dtypes."""

    def code(device: str) -> list[torch.Tensor]:
        whole, half = torch.zeros(4, 6, device=device), torch.zeros(4, 6, device=device, dtype=torch.bfloat16)
        numbers, square = torch.zeros(4, device=device, dtype=torch.long), torch.zeros(4, 4, device=device)
        return [
            numbers * 1, numbers * 1.0, numbers * True, whole * half, half * half, whole.mT.reshape(4, 6),
            square * 2, square.mT * 2, whole.reshape(2, 12), torch.ops.aten._unsafe_view(whole, [24]), *whole.unbind(1),
            *torch.ops.aten.native_layer_norm(whole, [6], None, None, 1e-5), *torch.ops.aten.topk(whole, 2),
            torch.cat([whole, half]), torch.cat([half, half]), whole.add_(1), whole[:, :3].contiguous(),
            torch.complex(whole, whole).conj() * 2, torch.arange(3, device=device),
        ]  # fmt: skip

    def forms(tensors: list[torch.Tensor]) -> list[tuple]:
        storages = [tensor.untyped_storage()._cdata for tensor in tensors]
        return [
            (tensor.shape, tensor.stride(), tensor.dtype, tensor.untyped_storage().nbytes(), storages.index(storage))
            for tensor, storage in zip(tensors, storages, strict=True)
        ]

    wanted, made = trace(lambda: code("cpu"), "cpu"), []
    for _ in range(2):
        assert trace(lambda: made.append(code("meta"))) == wanted
    assert forms(made[0]) == forms(made[1]) == forms(code("cpu"))


def test_attention_makes_no_square_on_meta():
    query, key = (torch.empty(1, 2, tokens, 16, device="meta") for tokens in (1000, 3000))
    found = trace(lambda: functional.scaled_dot_product_attention(query=query, key=key, value=key))
    assert found.peak == query.numel() * 4
    assert found.flops("attention") == 4 * 2 * 1000 * 3000 * 16


def test_the_model_needs_on_meta_what_it_needs_in_earnest():
    def run(device: str) -> torch.Tensor:
        base = bases[device]
        text = random_text(1, bases["cpu"].transformer).to(device)
        tokens, time = noise(1, plan.layout.image.tokens, 64).to(device), torch.full((1,), 0.5, device=device)
        return base.image_pass(tokens, text, time, plan, None, 3.0)

    bases = {device: drive(flux().to(device), backend="sdpa") for device in ("cpu", "meta")}
    plan = Method(guidance=False).plan(bases["cpu"].settings, 256, 256)
    run("cpu")  # index tables are cached
    real, shapes = trace(lambda: run("cpu"), "cpu"), trace(lambda: run("meta"))
    assert shapes.peak == pytest.approx(real.peak, rel=0.1), "torch's attention on a CPU has buffers of its own"
    assert shapes.flops("matmul") == real.flops("matmul")


def test_the_stock_model_needs_at_4096_px_what_was_measured():
    """One step of stock FLUX.1 with 12B random weights, eager, on an H100: 28.7 GiB, weights included."""
    tokens, components = 256 * 256, flux1_dev((1, 1))
    transformer, whole = components.transformer, flux1_dev().transformer

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta", dtype=torch.bfloat16)

    def step() -> torch.Tensor:
        return transformer(
            hidden_states=empty(1, tokens, 64), encoder_hidden_states=empty(1, 512, 4096),
            pooled_projections=empty(1, 768), timestep=empty(1), img_ids=empty(tokens, 3), txt_ids=empty(512, 3),
            guidance=empty(1),
        ).sample  # fmt: skip

    weights = sum(parameter.nbytes for parameter in whole.parameters())
    assert (weights + trace(step).peak) / GIB == pytest.approx(28.7, rel=0.02)
