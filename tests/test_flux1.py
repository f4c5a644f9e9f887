"""The two passes against stock diffusers, and against one dense computation over text, image and guidance at once."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxPipeline
from joint_oracle import Geometry, Joint
from small_bases import SETTINGS, add_random_lora, drive, flux, noise, random_text
from torch import Tensor

from scale_dit.errors import UserError
from scale_dit.method import Method, Plan
from scale_dit.models.flux_attention import norm_and_rotate

ORDERS = ("raster", "window", "hilbert")
TIMES = torch.tensor([0.3, 0.9871])


def raster(tokens: Tensor, order: Tensor) -> Tensor:
    """Undo the memory order."""
    result = torch.empty_like(tokens)
    result[:, order] = tokens
    return result


def stock_velocity(transformer, tokens: Tensor, text, time: Tensor, height: int, width: int, scale: float) -> Tensor:
    """`FluxTransformer2DModel.forward` as `FluxPipeline` calls it, tokens in raster order."""
    return transformer(
        hidden_states=tokens,
        encoder_hidden_states=text.tokens,
        pooled_projections=text.pooled,
        timestep=time,
        guidance=torch.full((len(tokens),), scale) if transformer.config.guidance_embeds else None,
        img_ids=FluxPipeline._prepare_latent_image_ids(len(tokens), height, width, "cpu", torch.float32),
        txt_ids=torch.zeros(text.tokens.shape[1], 3),
        return_dict=False,
    )[0]


@pytest.mark.parametrize("shape", ["tiny", "wide_heads", "distilled"])
@torch.no_grad()
def test_one_window_without_guidance_is_stock_diffusers(shape):
    transformer = flux(shape)
    tokens, text = noise(2, 70, 64), random_text(2, transformer)
    wanted = stock_velocity(transformer, tokens, text, TIMES, 10, 7, 3.5)
    base = drive(transformer)
    assert torch.equal(stock_velocity(transformer, tokens, text, TIMES, 10, 7, 3.5), wanted), "our processors alone"
    for order in ORDERS:
        plan = Method(windowed=False, guidance=False, order=order).plan(SETTINGS, 160, 112)
        given = base.image_pass(tokens[:, plan.layout.image_order], text, TIMES, plan, None, 3.5)
        torch.testing.assert_close(raster(given, plan.layout.image_order), wanted, rtol=0, atol=2e-5)


PATTERNS = {
    "official": {"halo_cells": 1, "scope": "aligned"},
    "disjoint": {"halo_cells": 0, "scope": "aligned", "anchors": "centred"},
    "shifted": {"halo_cells": 0, "scope": "aligned", "shift_windows": True},
    "global": {"halo_cells": 0, "scope": "global", "guidance_reach": "all", "anchors": "none"},
}


def geometry_of(pattern: dict, image: tuple[int, int], draft: tuple[int, int]) -> Geometry:
    return Geometry(
        text=SETTINGS.text_length,
        image=image,
        draft=draft,
        cell=SETTINGS.cell,
        window=SETTINGS.window,
        halo=pattern["halo_cells"] * SETTINGS.cell,
        scope=pattern["scope"],
        shift_odd_blocks=pattern.get("shift_windows", False),
        reach=pattern.get("guidance_reach", "adjacent"),
        anchors=pattern.get("anchors", "scaled"),
    )


def ours(base, plan: Plan, tokens: Tensor, text, time: Tensor, draft: Tensor, pooled: Tensor) -> tuple[Tensor, list]:
    """Both passes, with tokens in raster order at either end."""
    keys_values = base.guidance_pass(draft[:, plan.layout.guidance_order], pooled, plan, 3.5)
    velocity = base.image_pass(tokens[:, plan.layout.image_order], text, time, plan, keys_values, 3.5)
    return raster(velocity, plan.layout.image_order), keys_values


@pytest.mark.parametrize("scope", ["guidance", "all"])
@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_keys_computed_once_equal_keys_computed_at_every_step(pattern, scope):
    base, switches = drive(flux("small")), PATTERNS[pattern]
    add_random_lora(base, scope=scope)
    # 11 x 14 tokens over 6 x 7: ragged windows, ragged cells, and a ratio that is not the scale
    tokens, draft, pooled = noise(2, 154, 64), noise(2, 42, 64, seed=4), noise(2, 32, seed=6)
    joint = Joint(base.transformer, geometry_of(switches, (11, 14), (6, 7)))
    joint.adapted = frozenset({"guidance"} if scope == "guidance" else {"text", "image", "guidance"})
    for order in ORDERS:
        plan = Method(scale=2, order=order, **switches).plan(SETTINGS, 176, 224)
        stored = base.guidance_pass(draft[:, plan.layout.guidance_order], pooled, plan, 3.5)
        for seed, time in enumerate((TIMES, torch.tensor([1.0, 0.05]))):
            text = random_text(2, base.transformer, seed=seed)
            given = base.image_pass(tokens[:, plan.layout.image_order], text, time, plan, stored, 3.5)
            wanted = joint.velocity(tokens, text.tokens, text.pooled, time, draft, pooled, 3.5)
            torch.testing.assert_close(raster(given, plan.layout.image_order), wanted, rtol=0, atol=3e-5)
            for block, of_joint in zip(stored, joint.guidance_keys_values, strict=True):
                for once, every_step in zip(block, of_joint, strict=True):
                    torch.testing.assert_close(raster(once, plan.layout.guidance_order), every_step, rtol=0, atol=2e-5)


@pytest.mark.parametrize("shape", ["tiny", "distilled"])
@torch.no_grad()
def test_whole_model_equals_the_joint_computation(shape):
    base = drive(flux(shape))
    add_random_lora(base)
    tokens, draft, text = noise(2, 120, 64), noise(2, 30, 64, seed=4), random_text(2, base.transformer)
    plan = Method(scale=2).plan(SETTINGS, 192, 160)
    given, _ = ours(base, plan, tokens, text, TIMES, draft, text.pooled)
    joint = Joint(base.transformer, geometry_of(PATTERNS["official"], (12, 10), (6, 5)))
    wanted = joint.velocity(tokens, text.tokens, text.pooled, TIMES, draft, text.pooled, 3.5)
    torch.testing.assert_close(given, wanted, rtol=0, atol=5e-5)


def test_gradients_of_two_passes_equal_those_of_the_joint_computation():
    base = drive(flux("small"))
    parameters = add_random_lora(base)
    tokens, draft, text = noise(2, 120, 64), noise(2, 30, 64, seed=4), random_text(2, base.transformer)
    plan = Method(scale=2).plan(SETTINGS, 192, 160)
    given, _ = ours(base, plan, tokens, text, TIMES, draft, text.pooled)
    joint = Joint(base.transformer, geometry_of(PATTERNS["official"], (12, 10), (6, 5)))
    wanted = joint.velocity(tokens, text.tokens, text.pooled, TIMES, draft, text.pooled, 3.5)
    target = noise(*given.shape, seed=9)
    for got, right in zip(
        torch.autograd.grad((given * target).mean(), parameters),
        torch.autograd.grad((wanted * target).mean(), parameters),
        strict=True,
    ):
        assert right.abs().max() > 0
        torch.testing.assert_close(got, right, rtol=1e-3, atol=1e-4 * float(right.abs().max()))


@torch.no_grad()
def test_guidance_reads_the_draft_and_the_pooled_prompt_only():
    base = drive(flux("small"))
    add_random_lora(base)
    plan = Method(scale=2).plan(SETTINGS, 192, 160)
    draft, pooled = noise(2, 30, 64), noise(2, 32, seed=1)
    first = base.guidance_pass(draft, pooled, plan, 3.5)
    base.image_pass(noise(2, 120, 64), random_text(2, base.transformer), TIMES, plan, first, 3.5)
    again = base.guidance_pass(draft, pooled, plan, 3.5)
    other = base.guidance_pass(draft, pooled + 1, plan, 3.5)
    assert len(first) == 4
    assert first[0][0].shape == (2, 30, 2, 16)
    for before, after, changed in zip(first, again, other, strict=True):
        assert torch.equal(before[0], after[0])
        assert torch.equal(before[1], after[1])
        assert not torch.allclose(before[1], changed[1])


@torch.no_grad()
def test_image_reads_the_draft_that_lies_under_it_only():
    base = drive(flux("small"))
    plan = Method(scale=2, halo_cells=0, order="raster").plan(SETTINGS, 256, 256)
    tokens, draft, text = noise(1, 256, 64), noise(1, 64, 64, seed=4), random_text(1, base.transformer)
    first = base.transformer.transformer_blocks[:1], base.transformer.single_transformer_blocks[:0]
    base.transformer.transformer_blocks, base.transformer.single_transformer_blocks = first
    before, _ = ours(base, plan, tokens, text, TIMES[:1], draft, text.pooled)
    draft[0, -1] += 1  # the draft's last token: the aligned cells of the windows at the right and lower border
    after, _ = ours(base, plan, tokens, text, TIMES[:1], draft, text.pooled)
    moved = (before != after).any(-1).view(16, 16)
    assert moved[8:, 8:].all()
    assert not moved[:8].any()
    assert not moved[:, :8].any()


@pytest.mark.parametrize("scope", ["guidance", "all"])
def test_gradient_checkpointing_gives_the_same_gradients(scope):
    gradients = []
    for checkpointing in (False, True):
        base = drive(flux("small"), gradient_checkpointing=checkpointing)
        parameters = add_random_lora(base, scope=scope)
        plan = Method(scale=2, shift_windows=True).plan(SETTINGS, 192, 160)
        text = random_text(2, base.transformer)
        velocity, _ = ours(base, plan, noise(2, 120, 64), text, TIMES, noise(2, 30, 64, seed=4), text.pooled)
        gradients.append(torch.autograd.grad(velocity.square().mean(), parameters))
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=0, atol=1e-7)


def test_timesteps_stay_float32_up_to_their_embedding():
    base = drive(flux("small").to(torch.bfloat16))
    seen = []
    base.transformer.time_text_embed.time_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    plan = Method(windowed=False, guidance=False).plan(SETTINGS, 64, 64)
    with torch.no_grad():
        base.image_pass(noise(1, 16, 64), random_text(1, base.transformer), torch.tensor([0.9871]), plan, None, 1)
    assert seen[0].dtype == torch.float32
    assert seen[0].item() == pytest.approx(987.1, abs=1e-3)  # bfloat16 would make it 988


@torch.no_grad()
def test_ntk_one_changes_nothing_and_more_turns_slower():
    base = drive(flux("small"))
    tokens, text = noise(1, 70, 64), random_text(1, base.transformer)
    plans = [Method(windowed=False, guidance=False, ntk=ntk).plan(SETTINGS, 160, 112) for ntk in (1.0, 10.0)]
    plain, stretched = (base.image_pass(tokens, text, TIMES[:1], plan, None, 1) for plan in plans)
    assert not torch.allclose(plain, stretched, atol=1e-3)
    for ntk, plan in zip((1.0, 10.0), plans, strict=True):
        cosine, _ = base.rotary(plan.image_ids, Method(ntk=ntk), torch.device("cpu"))
        slowest = torch.outer(plan.image_ids[:, 2], torch.tensor([10000 ** (-4 / 6) / ntk])).cos()
        torch.testing.assert_close(cosine[:, -1:], slowest, rtol=0, atol=1e-6)


def test_pack_and_unpack_are_inverses_and_refuse_another_size():
    base = drive(flux("small"))
    latents = noise(2, 16, 20, 14)
    for order in ORDERS:
        plan = Method(windowed=False, guidance=False, order=order).plan(SETTINGS, 160, 112)
        tokens = base.pack(latents, plan.layout.image_order)
        assert torch.equal(base.unpack(tokens, plan.layout.image_order, 10, 7), latents)
    with pytest.raises(ValueError, match=r"80 tokens.*70"):
        base.pack(noise(2, 16, 20, 16), plan.layout.image_order)


def test_text_of_another_length_is_refused():
    base = drive(flux("small"))
    plan = Method(windowed=False, guidance=False).plan(SETTINGS, 64, 64)
    with pytest.raises(UserError, match="7 text tokens were given, but the plan is for 24"):
        base.image_pass(noise(1, 16, 64), random_text(1, base.transformer, length=7), TIMES[:1], plan, None, 1)


def test_norm_and_rotation_are_the_same_in_one_pass():
    attn = drive(flux()).transformer.transformer_blocks[0].attn
    query = torch.randn(2, 9, 3, attn.head_dim)
    angles = torch.randn(9, attn.head_dim // 2).repeat_interleave(2, dim=1)
    rotary = (angles.cos(), angles.sin())
    torch.testing.assert_close(
        norm_and_rotate(query, attn.norm_q, rotary, fused=True),
        norm_and_rotate(query, attn.norm_q, rotary, fused=False),
    )
