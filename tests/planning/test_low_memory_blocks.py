"""Chunked feed-forward layers, keys and values in host memory: the same velocity from less memory."""

from __future__ import annotations

import pytest
import torch
from small_bases import add_random_lora, drive, flux, noise, random_text

from scale_dit.method import Method
from scale_dit.models.chunking import chunked_feed_forward
from scale_dit.models.flux1 import Flux1
from scale_dit.models.keys_values import HostKeysValues

PX = 256


def velocity(base: Flux1) -> torch.Tensor:
    """One step that reads a draft."""
    plan = Method().plan(base.settings, PX, PX)
    text, time = random_text(1, base.transformer), torch.tensor([0.7])
    draft, picture = noise(1, plan.layout.guidance_tokens, 64), noise(1, plan.layout.image.tokens, 64, seed=4)
    with torch.no_grad():
        guidance = base.guidance_pass(draft, text.pooled, plan, 3.0)
        return base.image_pass(picture, text, time, plan, guidance, 3.0)


@pytest.mark.parametrize("tokens", [7, 64, 10_000])
@pytest.mark.parametrize("scope", ["guidance", "all"])
def test_feed_forward_by_parts_gives_the_same(tokens, scope):
    base = drive(flux("wide_heads"))
    add_random_lora(base, scope=scope)
    expected = velocity(base)
    base.feed_forward_tokens = tokens
    torch.testing.assert_close(velocity(base), expected, rtol=1e-4, atol=1e-5)
    assert not [name for name, module in base.transformer.named_modules() if "forward" in module.__dict__]


def test_parts_are_what_the_feed_forward_gets():
    base = drive(flux())
    widths: list[int] = []
    for block in base.blocks:
        layer = block.ff.net[0] if hasattr(block, "ff") else block.proj_out
        layer.register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].shape[1]))
    base.feed_forward_tokens = 100
    velocity(base)
    # A single block's last layer is seen with all tokens, since the parts are made inside its replaced `forward`.
    assert 100 in widths


def test_blocks_that_fail_get_their_layers_back():
    block = flux().single_transformer_blocks[0]
    with pytest.raises(RuntimeError, match="broken"), torch.no_grad(), chunked_feed_forward(block, 4):
        raise RuntimeError("broken")
    assert "forward" not in block.proj_out.__dict__


def test_with_gradients_nothing_changes():
    block = flux().single_transformer_blocks[0]
    with torch.enable_grad(), chunked_feed_forward(block, 4):
        assert "forward" not in block.proj_out.__dict__


def test_keys_and_values_in_host_memory_give_the_same_bits():
    base = drive(flux())
    expected = velocity(base)
    base.keys_values_on_host = True
    assert torch.equal(velocity(base), expected)


def test_host_keys_values_read_as_a_list_does():
    listed = [(noise(1, 3, 2, 4, seed=seed), noise(1, 3, 2, 4, seed=seed + 10)) for seed in range(4)]
    held = HostKeysValues(torch.device("cpu"))
    held.extend(listed[:1])
    held.extend(listed[1:])
    for index in (2, 0, 1, 2, 3, -1):
        assert all(map(torch.equal, held[index], listed[index]))
    assert len(held) == 4
    assert all(torch.equal(key, other) for (key, _), (other, _) in zip(held, listed, strict=True))
    assert len(held[1:3]) == 2
