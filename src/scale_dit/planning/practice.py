"""How much longer stages take than the sum of their operations: a thin base is run, and held against its own plan.

Rates of single operations leave out what lies between them: Python, small matrices, memory that is read again. The thin
base's transformer has the width of a real one, so that its operations are as large, and few blocks. Its text encoders
have the depth of real ones and are narrow: encoding one prompt on a card is bound by how fast it is asked for.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from scale_dit.method import Method
from scale_dit.models.random_weights import base_settings, fitted, on_meta, random_components
from scale_dit.models.settings import BaseSettings
from scale_dit.models.shapes import Shape, shape_of
from scale_dit.pipeline import ScaleDiTPipeline
from scale_dit.planning.apply import apply_memory
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


def in_practice(machine: Machine, device: torch.device, dtype: torch.dtype) -> Machine:
    """The machine with what its single rates do not say, `text_launch` and `practice`."""
    from scale_dit.generation.pictures import Sampling  # generation plans with this package

    on_gpu = device.type == "cuda"
    settings, shape, side = thin_base(on_gpu)
    sampling, method = Sampling(steps=STEPS, draft_steps=STEPS), Method()
    components = Components({name: module.to(dtype) for name, module in on_meta(fitted(shape)).items()})
    tracer = Tracer(settings, method, sampling, components, "auto", device)
    planner = Planner(tracer, components, machine, Memory(), on_gpu)
    way = planner.ways[0]
    predicted = planner.predict(side, side, way).seconds
    encoding = tracer.work(side, side, way.tokens).text

    pipeline = ScaleDiTPipeline(**random_components(shape, device, dtype), is_distilled=settings.distilled)
    pipeline.configure(settings)
    pipeline.method = method
    apply_memory(pipeline, way, device)

    def run() -> dict[str, float]:
        made: Any = pipeline(
            "a thin base", side, side, num_inference_steps=STEPS, draft_steps=STEPS, output_type="pt",
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        return made.cost.seconds

    run()
    runs = [run() for _ in range(RUNS)]
    taken = {stage: min(each[stage] for each in runs) for stage in predicted}
    text = taken.pop("text") / sum(encoding.operations.values())
    found = {stage: seconds / predicted[stage] for stage, seconds in taken.items()}
    return replace(machine, text_launch=text, practice=found)
