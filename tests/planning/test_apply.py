"""Ways to save memory on a real pipeline: the same bits from all but 8-bit weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_bases import add_random_lora

from scale_dit.models.hooks import called
from scale_dit.pipeline import ScaleDiTPipeline
from scale_dit.planning.apply import apply_memory, offload_blocks, store_in_8_bits
from scale_dit.planning.memory import Memory

PROMPT, NEGATIVE = "a large red circle on sand", "blue"
PROMPTS = [(PROMPT,), (NEGATIVE,)]
CPU = torch.device("cpu")


def load(folder: Path) -> ScaleDiTPipeline:
    pipeline = ScaleDiTPipeline.from_pretrained(folder)
    add_random_lora(pipeline.base)
    return pipeline


def picture(pipeline: ScaleDiTPipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipeline(
        PROMPT, 192, 256, negative_prompt=NEGATIVE, generator=generator, output_type="pt", scale=2.0,
        num_inference_steps=2, draft_steps=1,
    ).images  # fmt: skip


@pytest.fixture(scope="module")
def expected(small_folder: Path) -> torch.Tensor:
    return picture(load(small_folder))


@pytest.mark.parametrize(
    "memory",
    [
        Memory("none", 0, "device"),
        Memory("text", 0, "device"),
        Memory("text", 0, "host"),
        Memory("group", 0, "host"),
    ],
    ids=str,
)
def test_pictures_are_the_same_bits(small_folder, expected, memory):
    pipeline = load(small_folder)
    apply_memory(pipeline, memory, CPU, PROMPTS)
    assert torch.equal(picture(pipeline), expected)
    assert torch.equal(picture(pipeline), expected), "also the second one, after hooks have run"


def test_parts_change_no_more_than_rounding(small_folder, expected):
    pipeline = load(small_folder)
    apply_memory(pipeline, Memory("text", 50, "device"), CPU, PROMPTS)
    torch.testing.assert_close(picture(pipeline), expected, atol=2e-3, rtol=0)


def test_text_encoders_are_gone(small_folder):
    pipeline = load(small_folder)
    apply_memory(pipeline, Memory("text", 0, "device"), CPU, PROMPTS)
    assert pipeline.text_encoder is pipeline.text_encoder_2 is None
    assert pipeline.base.pipeline.text_encoder_2 is None
    with pytest.raises(Exception):  # noqa: B017 - whatever diffusers raises without an encoder
        pipeline.base.encode_prompts(["another prompt"])


def test_8_bit_weights_stay_near_and_the_lora_exact(small_folder, expected):
    pipeline, before = load(small_folder), load(small_folder)
    store_in_8_bits(pipeline.transformer)
    layer, exact_layer = (each.transformer.transformer_blocks[0].ff.net[2] for each in (pipeline, before))
    assert layer.base_layer.weight.dtype == torch.float8_e4m3fn
    lora = [part for name, part in pipeline.transformer.named_parameters() if "lora_" in name]
    assert lora
    assert {part.dtype for part in lora} == {torch.float32}
    assert pipeline.base.dtype == torch.float32

    hidden = torch.randn(1, 8, exact_layer.in_features, generator=torch.Generator().manual_seed(0))
    exact = exact_layer.base_layer(hidden)
    error = (layer.base_layer(hidden) - exact).norm() / exact.norm()
    assert 0.01 < error < 0.04, "three bits of mantissa: about 2.6 % of a product of random numbers"

    difference = (picture(pipeline) - expected).abs().mean()
    assert 0 < difference < 0.05, "random weights, which do not calm anything: trained ones differ less"


def test_every_block_is_brought_in_both_passes(small_folder):
    pipeline = load(small_folder)
    transformer = pipeline.transformer
    brought: list[str] = []
    offload_blocks(transformer, CPU)
    for name, module in transformer.named_modules():
        registry = getattr(module, "_diffusers_hook", None)
        hook = registry.get_hook("group_offloading") if registry is not None else None
        if hook is not None:
            onload = hook.group.onload_
            hook.group.onload_ = lambda n=name, run=onload: (brought.append(n), run())
    picture(pipeline)
    count = len(transformer.transformer_blocks) + len(transformer.single_transformer_blocks)
    # One draft step and two refine steps with two branches each, and the guidance pass; the model itself beside blocks.
    branches = (1 + 2) * 2
    assert len(brought) == (branches + 1) * (count + 1)
    assert brought[: count + 1] == [
        "",
        *(f"transformer_blocks.{i}" for i in range(len(transformer.transformer_blocks))),
        *(f"single_transformer_blocks.{i}" for i in range(len(transformer.single_transformer_blocks))),
    ]


def test_hooks_of_a_module_run_around_what_uses_its_parts(small_folder):
    transformer = load(small_folder).transformer
    offload_blocks(transformer, CPU)
    hook = transformer._diffusers_hook.get_hook("group_offloading")
    seen: list[str] = []
    hook.group.onload_, hook.group.offload_ = (lambda: seen.append("on")), (lambda: seen.append("off"))
    with called(transformer):
        seen.append("run")
    assert seen == ["on", "run", "off"]
