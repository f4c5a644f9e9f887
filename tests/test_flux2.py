"""FLUX.2's passes against stock diffusers, and against one dense computation over text, image and guidance at once."""

from __future__ import annotations

import pytest
import torch
from diffusers import Flux2KleinPipeline
from joint_oracle import Joint2
from small_bases import SETTINGS, add_random_lora, drive_klein, klein, noise, random_text
from test_flux1 import ORDERS, PATTERNS, TIMES, geometry_of, ours, raster
from torch import Tensor

from scale_dit.lora_targets import target_modules
from scale_dit.method import Method


def stock_velocity(transformer, tokens: Tensor, text, time: Tensor, height: int, width: int) -> Tensor:
    """`Flux2Transformer2DModel.forward` as `Flux2KleinPipeline` calls it, tokens in raster order."""
    return transformer(
        hidden_states=tokens,
        encoder_hidden_states=text.tokens,
        timestep=time,
        guidance=None,
        img_ids=Flux2KleinPipeline._prepare_latent_ids(torch.empty(len(tokens), 1, height, width)),
        txt_ids=Flux2KleinPipeline._prepare_text_ids(text.tokens),
        return_dict=False,
    )[0]


@pytest.mark.parametrize("axis", [4, 32])
@torch.no_grad()
def test_one_window_without_guidance_is_stock_diffusers(axis):
    transformer = klein(axis=axis)
    tokens, text = noise(2, 70, 128), random_text(2, transformer)
    wanted = stock_velocity(transformer, tokens, text, TIMES, 10, 7)
    base = drive_klein(transformer)
    assert torch.equal(stock_velocity(transformer, tokens, text, TIMES, 10, 7), wanted), "our processors alone"
    for order in ORDERS:
        plan = Method(windowed=False, guidance=False, order=order).plan(SETTINGS, 160, 112)
        given = base.image_pass(tokens[:, plan.layout.image_order], text, TIMES, plan, None, 1)
        torch.testing.assert_close(raster(given, plan.layout.image_order), wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("scope", ["guidance", "all"])
@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_keys_computed_once_equal_keys_computed_at_every_step(pattern, scope):
    base, switches = drive_klein(klein()), PATTERNS[pattern]
    add_random_lora(base, scope=scope)
    # 11 x 14 tokens over 6 x 7: ragged windows, ragged cells, and a ratio that is not the scale
    tokens, draft, pooled = noise(2, 154, 128), noise(2, 42, 128, seed=4), torch.empty(2, 0)
    joint = Joint2(base.transformer, geometry_of(switches, (11, 14), (6, 7)))
    joint.adapted = frozenset({"guidance"} if scope == "guidance" else {"text", "image", "guidance"})
    plan = Method(scale=2, order="hilbert", **switches).plan(SETTINGS, 176, 224)
    stored = base.guidance_pass(draft[:, plan.layout.guidance_order], pooled, plan, 1)
    for seed, time in enumerate((TIMES, torch.tensor([1.0, 0.05]))):
        text = random_text(2, base.transformer, seed=seed)
        given = base.image_pass(tokens[:, plan.layout.image_order], text, time, plan, stored, 1)
        wanted = joint.velocity(tokens, text.tokens, text.pooled, time, draft, pooled, 1)
        torch.testing.assert_close(raster(given, plan.layout.image_order), wanted, rtol=0, atol=3e-5)
        for block, of_joint in zip(stored, joint.guidance_keys_values, strict=True):
            for once, every_step in zip(block, of_joint, strict=True):
                torch.testing.assert_close(raster(once, plan.layout.guidance_order), every_step, rtol=0, atol=2e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_two_passes_equal_those_of_the_joint_computation(checkpointing):
    base = drive_klein(klein(), gradient_checkpointing=checkpointing)
    parameters = add_random_lora(base)
    tokens, draft, text = noise(2, 120, 128), noise(2, 30, 128, seed=4), random_text(2, base.transformer)
    plan = Method(scale=2).plan(SETTINGS, 192, 160)
    given, _ = ours(base, plan, tokens, text, TIMES, draft, text.pooled)
    joint = Joint2(base.transformer, geometry_of(PATTERNS["official"], (12, 10), (6, 5)))
    wanted = joint.velocity(tokens, text.tokens, text.pooled, TIMES, draft, text.pooled, 1)
    target = noise(*given.shape, seed=9)
    for got, right in zip(
        torch.autograd.grad((given * target).mean(), parameters),
        torch.autograd.grad((wanted * target).mean(), parameters),
        strict=True,
    ):
        assert right.abs().max() > 0
        torch.testing.assert_close(got, right, rtol=1e-3, atol=1e-4 * float(right.abs().max()))


@torch.no_grad()
def test_few_tokens_at_a_time_give_the_same():
    base = drive_klein(klein())
    add_random_lora(base)
    tokens, draft, text = noise(1, 120, 128), noise(1, 30, 128, seed=4), random_text(1, base.transformer)
    plan = Method(scale=2).plan(SETTINGS, 192, 160)
    whole, _ = ours(base, plan, tokens, text, TIMES[:1], draft, text.pooled)
    widest = []
    layer = base.transformer.single_transformer_blocks[0].attn.to_qkv_mlp_proj
    layer.register_forward_hook(lambda _, inputs, output: widest.append(output.shape[1]))
    base.feed_forward_tokens = 13
    parts, _ = ours(base, plan, tokens, text, TIMES[:1], draft, text.pooled)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)
    assert max(widest) == 13


@torch.no_grad()
@pytest.mark.parametrize("tokens", [None, 13])
def test_kept_keys_and_values_hold_nothing_else(tokens):
    """A value was a view into the output of a single block's joint projection, nine times as wide, kept with it."""
    base = drive_klein(klein())
    base.feed_forward_tokens = tokens
    plan = Method(scale=2).plan(SETTINGS, 192, 160)
    kept = base.guidance_pass(noise(1, 30, 128, seed=4), random_text(1, base.transformer).pooled, plan, 1.0)
    for part in (part for pair in kept for part in pair):
        assert part.untyped_storage().nbytes() == part.nbytes


def test_timesteps_stay_float32_up_to_their_embedding():
    base = drive_klein(klein().to(torch.bfloat16))
    seen = []
    base.transformer.time_guidance_embed.time_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    plan = Method(windowed=False, guidance=False).plan(SETTINGS, 64, 64)
    with torch.no_grad():
        base.image_pass(noise(1, 16, 128), random_text(1, base.transformer), torch.tensor([0.9871]), plan, None, 1)
    assert seen[0].dtype == torch.float32
    assert seen[0].item() == pytest.approx(987.1, abs=1e-3)  # bfloat16 would make it 988


def test_slower_rotation_leaves_the_words_where_they_are():
    base = drive_klein(klein())
    ids = torch.cat([base.text_ids(5), base.token_ids(torch.tensor([[0.0, 3.0, 7.0]]))])
    plain, slow = (base.rotary(ids, Method(ntk=ntk), torch.device("cpu"))[0] for ntk in (1.0, 10.0))
    assert torch.equal(plain[:5], slow[:5])
    assert not torch.equal(plain[5:], slow[5:])
    # The slower of an axis' two frequencies: 2000^(-1/2), divided by the factor.
    torch.testing.assert_close(slow[5, [7, 11]], (torch.tensor([3.0, 7.0]) * 2000**-0.5 / 10).cos(), rtol=0, atol=1e-6)


def test_adapters_sit_where_the_design_says():
    transformer = klein(layers=(2, 3))
    names = target_modules(transformer)
    double = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.linear_in", "ff.linear_out"]
    wanted = ["x_embedder"]
    wanted += [f"transformer_blocks.{i}.{layer}" for i in (0, 1) for layer in double]
    wanted += [f"single_transformer_blocks.{i}.attn.{layer}" for i in (0, 1) for layer in ("to_qkv_mlp_proj", "to_out")]
    wanted += ["single_transformer_blocks.2.attn.to_qkv_mlp_proj"]
    assert names == wanted
    assert len(names) == 1 + 2 * 6 + 2 * 2 + 1
    add_random_lora(base := drive_klein(transformer))
    adapted = {name for name, module in base.transformer.named_modules() if hasattr(module, "lora_A")}
    assert adapted == set(wanted)
