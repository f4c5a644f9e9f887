"""Where the LoRA sits and acts, and its gradients."""

from __future__ import annotations

import pytest
import torch
from lora_helpers import PLAN, TIMES, both_passes
from peft.tuners.tuners_utils import BaseTunerLayer
from small_bases import add_random_lora, drive, flux, noise, random_text

from scale_dit.errors import UserError
from scale_dit.lora import ADAPTER, LoraSettings, active_adapters, add_lora
from scale_dit.lora_targets import target_modules


def recorded_projections(base) -> list[torch.Tensor]:
    """Outputs of every key and value projection during an image pass that reads fixed guidance."""
    seen: list[torch.Tensor] = []
    hooks = [
        module.register_forward_hook(lambda *call: seen.append(call[2]))
        for name, module in base.transformer.named_modules()
        if name.endswith(("attn.to_k", "attn.to_v", "attn.to_q"))
    ]
    fixed = [(noise(2, 30, 2, 16, seed=block), noise(2, 30, 2, 16, seed=9 + block)) for block in range(4)]
    base.image_pass(noise(2, 120, 64), random_text(2, base.transformer), TIMES, PLAN, fixed, 3.5)
    for hook in hooks:
        hook.remove()
    assert len(seen) == 12
    return seen


def test_targets_are_the_image_side_and_nothing_behind_the_last_keys():
    targets = target_modules(flux("tiny"))
    assert len(targets) == 1 + 2 * 6 + 5 * 5 + 2
    assert [name for name in targets if name.startswith("single_transformer_blocks.5")] == [
        "single_transformer_blocks.5.attn.to_k",
        "single_transformer_blocks.5.attn.to_v",
    ]
    assert not [name for name in targets if "add_" in name or "context" in name or "norm" in name]
    transformer = flux("small")
    transformer.single_transformer_blocks = transformer.single_transformer_blocks[:0]
    assert target_modules(transformer)[-2:] == ["transformer_blocks.1.attn.to_k", "transformer_blocks.1.attn.to_v"]


@pytest.mark.parametrize("scope", ["guidance", "all"])
@torch.no_grad()
def test_a_fresh_lora_changes_nothing(scope):
    base = drive(flux("small"))
    before, keys_before = both_passes(base)
    add_lora(base.transformer, LoraSettings(rank=4, scope=scope))
    base.guidance_adapters = base.image_adapters = (ADAPTER,)
    after, keys_after = both_passes(base)
    assert torch.equal(before, after)
    for plain, adapted in zip(keys_before, keys_after, strict=True):
        assert torch.equal(plain[0], adapted[0])
        assert torch.equal(plain[1], adapted[1])


@pytest.mark.parametrize("scope", ["guidance", "all"])
@torch.no_grad()
def test_scope_decides_whether_image_tokens_feel_the_lora(scope):
    base = drive(flux("small"))
    velocity, keys_values = both_passes(base)
    projections = recorded_projections(base)
    add_random_lora(base, scope=scope)
    changed_velocity, changed_keys_values = both_passes(base)
    for (key, value), (changed_key, changed_value) in zip(keys_values, changed_keys_values, strict=True):
        assert not torch.allclose(key, changed_key, atol=1e-3)
        assert not torch.allclose(value, changed_value, atol=1e-3)
    assert not torch.allclose(velocity, changed_velocity, atol=1e-3)
    for plain, adapted in zip(projections, recorded_projections(base), strict=True):
        assert torch.equal(plain, adapted) == (scope == "guidance")


@pytest.mark.parametrize("scope", ["guidance", "all"])
def test_every_lora_parameter_and_nothing_else_gets_a_gradient(scope):
    base = drive(flux("small"))
    parameters = add_random_lora(base, scope=scope)
    velocity, _ = both_passes(base)
    velocity.square().mean().backward()
    assert len(parameters) == 2 * len(target_modules(base.transformer))
    for name, parameter in base.transformer.named_parameters():
        if ".lora_" in name:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name
            assert not parameter.requires_grad, name


def test_lora_is_float32_on_a_bfloat16_base():
    transformer = flux("small").to(torch.bfloat16)
    parameters = add_lora(transformer, LoraSettings(rank=4))
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    assert transformer.x_embedder.base_layer.weight.dtype == torch.bfloat16


def test_active_adapters_are_put_back_after_an_error():
    base = drive(flux("small"))
    add_random_lora(base)
    layers = [module for module in base.transformer.modules() if isinstance(module, BaseTunerLayer)]
    with active_adapters(base.transformer, ()):
        assert all(layer.active_adapters == [] for layer in layers)
    with pytest.raises(ZeroDivisionError), active_adapters(base.transformer, ()):
        1 / 0
    assert all(layer.active_adapters == [ADAPTER] for layer in layers)
    assert all(layer.lora_A[ADAPTER].weight.requires_grad for layer in layers)


def test_settings_that_cannot_be():
    with pytest.raises(UserError, match="rank is 0"):
        LoraSettings(rank=0)
    with pytest.raises(UserError, match="Unknown LoRA scope 'text': use one of guidance, all"):
        LoraSettings(scope="text")
