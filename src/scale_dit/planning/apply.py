"""Bring a pipeline whose weights were loaded into host memory to the device, in the way that was chosen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers.hooks import apply_group_offloading

from scale_dit.pipeline import ScaleDiTPipeline
from scale_dit.pipeline_output import StageCost
from scale_dit.planning.memory import Memory


def apply_memory(
    pipeline: ScaleDiTPipeline, memory: Memory, device: torch.device, prompts: Iterable[Sequence[str]] = ()
) -> StageCost:
    """Place a pipeline's parts, with its LoRA, as `memory` says; returns the cost of stages that were run for it.

    Args:
        memory: What was chosen: nothing in it is `auto`.
        prompts: Every list of prompts that will be encoded, where text encoders do not stay.
    """
    cost = StageCost()
    pipeline.base.feed_forward_tokens = memory.tokens
    pipeline.base.keys_values_on_host = memory.keys_values == "host"
    pipeline.decoding = replace(pipeline.decoding, mode=memory.decode)
    if memory.weights == "fp8":
        store_in_8_bits(pipeline.transformer)
    if memory.offload == "none":
        pipeline.to(device)
    elif memory.offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    else:
        encode_ahead(pipeline, prompts, device, cost, by_layers=memory.offload == "group")
        if memory.offload == "group":
            offload_blocks(pipeline.transformer, device)
            pipeline.vae.to(device)
        else:
            pipeline.to(device)
    return cost


def store_in_8_bits(transformer: Any) -> None:
    """Keep weights of linear layers in 8 bits, widened for each product; modulation and LoRA stay as they are."""
    transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=transformer.dtype)


def encode_ahead(
    pipeline: ScaleDiTPipeline,
    prompts: Iterable[Sequence[str]],
    device: torch.device,
    cost: StageCost,
    by_layers: bool = False,
) -> None:
    """Encode all lists of prompts, and drop the text encoders: the base has the answers.

    Args:
        cost: Where it is noted what encoding takes.
        by_layers: Only the layer that runs is on the device.
    """
    encoders, on_gpu = pipeline.base.text_encoders, device.type == "cuda"
    for encoder in encoders.values():
        if by_layers:
            apply_group_offloading(
                encoder, onload_device=device, offload_type="leaf_level", use_stream=on_gpu, record_stream=on_gpu
            )
        else:
            encoder.to(device)
    with cost.stage("text", device):
        pipeline.base.remember_prompts(prompts)
    pipeline.register_modules(**dict.fromkeys(encoders))
    pipeline.base.drop_text_encoders()


def offload_blocks(transformer: Any, device: torch.device) -> None:
    """Keep the transformer's blocks in host memory; on a GPU the next one is copied while one computes.

    The blocks' order is seen in the first pass; see `scale_dit.models.hooks` on how the hooks come to run. What is in
    no block stays on the device: diffusers would take it away after each step and bring it again, and wait for both.
    """
    on_gpu = device.type == "cuda"
    transformer.enable_group_offload(
        onload_device=device, offload_type="block_level", num_blocks_per_group=1, use_stream=on_gpu,
        record_stream=on_gpu,
    )  # fmt: skip
    rest = transformer._diffusers_hook.get_hook("group_offloading").group
    rest.onload_()
    rest.modules, rest.parameters, rest.buffers = [], [], []
