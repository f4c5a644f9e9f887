"""Latents of the pipeline and of the stock one."""

from __future__ import annotations

import torch
from diffusers import FluxPipeline

from scale_dit.pipeline import ScaleDiTPipeline

PROMPTS = ["a large red circle on sand", "a small blue star left of a green square"]


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def latents_of(pipeline: ScaleDiTPipeline, prompt=PROMPTS[0], height=256, width=256, seed=0, **options):
    generator = options.pop("generator", None) or seeded(seed)[0]
    return pipeline(prompt, height, width, generator=generator, output_type="latent", **options).images


def stock_latents(stock: FluxPipeline, prompts, height: int, width: int, generator, **options) -> torch.Tensor:
    packed = stock(
        prompts,
        height=height,
        width=width,
        generator=generator,
        max_sequence_length=24,
        output_type="latent",
        **options,
    ).images
    return FluxPipeline._unpack_latents(packed, height, width, 8)
