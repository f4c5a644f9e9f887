"""Offloading with streams and predicted peaks, where they are for real."""

from __future__ import annotations

import pytest
import torch
from small_bases import add_random_lora

from scale_dit.pipeline import ScaleDiTPipeline
from scale_dit.planning.apply import apply_memory
from scale_dit.planning.calibrate import measure
from scale_dit.planning.machine import free_bytes
from scale_dit.planning.memory import Memory

pytestmark = pytest.mark.gpu

PROMPT = "a large red circle on sand"
GPU = torch.device("cuda")


def picture(folder, memory: Memory) -> list[torch.Tensor]:
    """Two pictures after another: prefetching begins with the second pass."""
    pipeline = ScaleDiTPipeline.from_pretrained(folder)
    add_random_lora(pipeline.base)
    apply_memory(pipeline, memory, GPU, [(PROMPT,), ("",)])
    return [
        pipeline(
            PROMPT, 256, 256, generator=torch.Generator().manual_seed(seed), output_type="pt", scale=2.0,
            num_inference_steps=3, draft_steps=2,
        ).images.cpu()
        for seed in range(2)
    ]  # fmt: skip


@pytest.mark.parametrize("offload", ["text", "model", "group"])
def test_pictures_are_the_same_bits(small_folder, offload):
    expected = picture(small_folder, Memory("none", 0, "device"))
    found = picture(small_folder, Memory(offload, 0, "host"))
    assert all(map(torch.equal, found, expected))


def test_what_is_in_no_block_stays_on_the_card(small_folder):
    pipeline = ScaleDiTPipeline.from_pretrained(small_folder)
    apply_memory(pipeline, Memory("group", 0, "host"), GPU, [(PROMPT,), ("",)])
    for _ in range(2):
        pipeline(PROMPT, 256, 256, output_type="pt", scale=2.0, num_inference_steps=1, draft_steps=1)
        places = {name: parameter.device.type for name, parameter in pipeline.transformer.named_parameters()}
        in_blocks = {place for name, place in places.items() if "transformer_blocks." in name}
        elsewhere = {place for name, place in places.items() if "transformer_blocks." not in name}
        assert (in_blocks, elsewhere) == ({"cpu"}, {"cuda"})


def test_rates_are_those_of_a_gpu():
    machine = measure(GPU, torch.bfloat16)
    assert machine.group_copy > 1e9
    assert machine.first_encoding > 0
    assert 0 < machine.between_steps < 0.2
    assert 0.5 < machine.practice["decode"] < 3
    assert machine.matmul > 1e13
    assert machine.bandwidth > 1e11
    assert machine.host_copy > 1e9


def test_a_cap_is_what_is_free():
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction(0.25)
        assert free_bytes(GPU) <= 0.25 * total
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
