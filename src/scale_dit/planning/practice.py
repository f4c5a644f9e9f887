"""How much longer stages take than the sum of their operations: a thin base is run, and held against its own plan.

Also what its text encoders take when they are first called, and how fast its blocks come from host memory.

Rates of single operations leave out what lies between them: Python, small matrices, memory that is read again. On a
processor that is a share of what is computed, in the autoencoder on a card, too; denoising steps of any size wait about
20 ms more on a card. The thin base's transformer has the width of a real one, so that its operations are as large, and
few blocks. Its text encoders have the depth of real ones and are narrow: encoding one prompt on a card is bound by how
fast it is asked for.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from scale_dit.method import Method
from scale_dit.models import load_family
from scale_dit.models.random_weights import base_settings, fitted, on_meta, random_components
from scale_dit.models.settings import BaseSettings
from scale_dit.models.shapes import Shape, shape_of
from scale_dit.pipeline import ScaleDiTPipeline
from scale_dit.pipeline_output import StageCost
from scale_dit.planning.apply import apply_memory, offload_blocks
from scale_dit.planning.components import Components
from scale_dit.planning.machine import Machine
from scale_dit.planning.memory import Memory
from scale_dit.planning.predict import Planner
from scale_dit.planning.work import Tracer

NAME = "flux1_dev"
STEPS = 2
RUNS = 2


def thin_base(on_gpu: bool) -> tuple[BaseSettings, Shape, int]:
    """Settings and shape of the thin base, and the side in px of the picture that is made with it.

    On a processor it is the shape of the embedded base.
    """
    full, tiny = shape_of(NAME, "full"), shape_of(NAME, "tiny")
    text = {
        "text_encoder": tiny["text_encoder"].resized(num_hidden_layers=12),
        "text_encoder_2": tiny["text_encoder_2"].resized(num_layers=24),
    }
    narrow = {name: tiny["transformer"].sizes[name] for name in ("pooled_projection_dim", "joint_attention_dim")}
    if on_gpu:
        transformer = full["transformer"].resized(num_layers=4, num_single_layers=8, **narrow)
        return base_settings(NAME), {**full, **text, "transformer": transformer}, 2048
    transformer = tiny["transformer"].resized(
        num_layers=2, num_single_layers=6, num_attention_heads=8, attention_head_dim=32, axes_dims_rope=(4, 14, 14)
    )
    vae = tiny["vae"].resized(block_out_channels=(32, 64, 96, 128), norm_num_groups=32)
    return replace(base_settings(NAME, "tiny"), native=256), {**text, "transformer": transformer, "vae": vae}, 512


def thin_pipeline(device: torch.device, dtype: torch.dtype) -> ScaleDiTPipeline:
    """The thin base with random weights, on the device."""
    settings, shape, _ = thin_base(device.type == "cuda")
    pipeline = ScaleDiTPipeline(**random_components(shape, device, dtype), is_distilled=settings.distilled)
    pipeline.configure(settings)
    pipeline.method = Method()
    return pipeline


def first_encoding(device: str, dtype: torch.dtype) -> float:
    """Seconds that the first prompt takes beyond the next one, in a process in which nothing was computed before.

    Another process must have used the libraries before, or it is the disk that is measured.
    """
    settings, shape, _ = thin_base(on_gpu=True)
    text = {name: part for name, part in shape.items() if name.startswith("text_encoder")}
    parts = dict.fromkeys(("vae", "transformer")) | random_components(text, device, dtype)
    driver, costs = load_family(settings).from_components(parts, settings), (StageCost(), StageCost())
    for cost in costs:
        with cost.stage("text", torch.device(device)):
            driver.encode_text(["a thin base"], settings.text_length, torch.device(device))
    return max(0.0, costs[0].seconds["text"] - costs[1].seconds["text"])


def in_practice(machine: Machine, pipeline: ScaleDiTPipeline) -> Machine:
    """The machine with what its single rates do not say: `text_launch`, `practice`, `between_steps` and `group_copy`.

    Args:
        pipeline: The thin one. On a GPU it is offloaded afterwards.
    """
    from scale_dit.generation.pictures import Sampling  # generation plans with this package

    device, dtype = pipeline.base.device, pipeline.base.dtype
    on_gpu = device.type == "cuda"
    settings, shape, side = thin_base(on_gpu)
    sampling = Sampling(steps=STEPS, draft_steps=STEPS)
    components = Components({name: module.to(dtype) for name, module in on_meta(fitted(shape)).items()})
    tracer = Tracer(settings, pipeline.method, sampling, components, "auto", device)
    planner = Planner(tracer, components, machine, Memory(), on_gpu)
    way = planner.ways[0]
    predicted = planner.predict(side, side, way).seconds
    encoding = tracer.work(side, side, way.tokens).text
    apply_memory(pipeline, way, device)

    def taken() -> dict[str, float]:
        """Seconds by stage, of the runs in which each was disturbed least."""
        runs = []
        for _ in range(1 + RUNS):
            made: Any = pipeline(
                "a thin base", side, side, num_inference_steps=STEPS, draft_steps=STEPS, output_type="pt",
                generator=torch.Generator().manual_seed(0),
            )  # fmt: skip
            runs.append(made.cost.seconds)
        return {stage: min(each[stage] for each in runs[1:]) for stage in predicted}

    found = taken()
    text = found.pop("text") / sum(encoding.operations.values())
    practice = {stage: seconds / predicted[stage] for stage, seconds in found.items()}
    if not on_gpu:
        return replace(machine, text_launch=text, practice=practice)
    between_steps = max(0.0, found["draft"] - predicted["draft"]) / STEPS
    offload_blocks(pipeline.transformer, device)
    return replace(
        machine, text_launch=text, practice={"decode": practice["decode"]}, between_steps=between_steps,
        group_copy=STEPS * planner.weights.blocks / taken()["draft"],
    )  # fmt: skip
