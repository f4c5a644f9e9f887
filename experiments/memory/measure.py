"""Seconds and peak memory of full-size bases on one GPU, beside what was planned. Each command takes below 500 s.

python experiments/memory/measure.py steps --px 4096
python experiments/memory/measure.py pictures --px 4096 8192
python experiments/memory/measure.py pictures --px 4096 --steps 1 --cap 24
python experiments/memory/measure.py least --px 2048 4096
python experiments/memory/run.py

README.md has all of them. Caps are enforced with `torch.cuda.set_per_process_memory_fraction`. Rows go to steps.csv,
pictures.csv and least.csv in this folder, or in the one that --to names.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from scale_dit.benchmark.timing import need_gpu, peak_and_seconds
from scale_dit.device import pin_with_threads
from scale_dit.evaluation.studies import add_rows
from scale_dit.generation.pictures import Picture, Sampling
from scale_dit.method import Method
from scale_dit.models.driver import Driver
from scale_dit.models.random_weights import base_settings, random_part, random_pipeline, write_configs
from scale_dit.models.shapes import SHAPES, shape_of
from scale_dit.models.text import Text
from scale_dit.pipeline import ScaleDiTPipeline
from scale_dit.pipeline_output import StageCost
from scale_dit.planning.components import Components
from scale_dit.planning.memory import PART, Memory
from scale_dit.planning.predict import Prediction
from scale_dit.planning.run import RunPlan
from scale_dit.recipe import native_scale

HERE = Path(__file__).parent
DEVICE, DTYPE = torch.device("cuda", 0), torch.bfloat16
PROMPT = "a harbour at dawn"
FIRST, GUIDANCE = "flux1_dev", 3.5
DENSE = "stock_eager", "stock_compiled"
WINDOWED = (
    "windowed_eager", "windowed_parts", "windowed_low_memory", "windowed_compiled", "windowed_parts_compiled",
    "windowed_low_memory_compiled",
)  # fmt: skip


def cap_memory(gb: float | None) -> None:
    """Let torch have no more than `gb` GB of the card; `None`: all of it."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(1.0 if gb is None else min(1.0, gb * 1e9 / total))


class Side(NamedTuple):
    """A picture's size in px, as `4096` or as `10240x4096`, width first."""

    label: str
    height: int
    width: int

    @classmethod
    def of(cls, text: str) -> Side:
        """Read from the command line."""
        width, _, height = text.partition("x")
        return cls(text, int(height or width), int(width))


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=DTYPE)


def steps_table(base: str) -> str:
    """Name of the table of a base's steps."""
    return "steps.csv" if base == FIRST else f"steps_{base}.csv"


@torch.no_grad()
def measure_steps(options: argparse.Namespace) -> None:
    """One denoising step of the picture: stock and windowed, eager and compiled, weights on the card."""
    settings = base_settings(options.base)
    transformer = random_part(shape_of(options.base, "full")["transformer"], DEVICE)
    stock = dict(transformer.attn_processors)
    for px, kind in product(options.px, options.kinds):
        driver = Components({"transformer": transformer}).driver(settings, "auto")
        if kind in DENSE:
            transformer.set_attn_processor(dict(stock))
        step = _stock_step(driver, px) if kind in DENSE else _windowed_step(driver, px, kind)
        if compiled := kind.endswith("compiled"):
            for block in driver.blocks:
                block.compile()
        peak, seconds = peak_and_seconds(step, compiled)
        for block in driver.blocks:
            block._compiled_call_impl = None
        torch._dynamo.reset()
        row = {"px": px.label, "kind": kind, "seconds": f"{seconds:.4f}", "peak_gb": f"{peak:.3f}"}
        add_rows(options.to / steps_table(options.base), [row], ("px", "kind"))
        print(*row.values(), flush=True)
        del step, driver
        gc.collect()
        torch.cuda.empty_cache()


def _stock_step(driver: Driver, px: Side) -> Callable[[], object]:
    """The transformer as it is, over text and image."""
    config, length = driver.transformer.config, driver.settings.text_length
    tokens = px.height * px.width // driver.settings.token_size**2
    inputs = {
        "hidden_states": random(1, tokens, config.in_channels), "timestep": random(1).abs(),
        "encoder_hidden_states": random(1, length, config.joint_attention_dim),
        "img_ids": driver.token_ids(torch.zeros(tokens, 3)).to(DEVICE), "txt_ids": driver.text_ids(length).to(DEVICE),
    }  # fmt: skip
    if driver.pooled_size:
        inputs["pooled_projections"] = random(1, driver.pooled_size)
    if config.guidance_embeds:
        inputs["guidance"] = random(1).abs()

    def step() -> object:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return driver.transformer(**inputs)

    return step


def _windowed_step(driver: Driver, px: Side, kind: str) -> Callable[[], object]:
    settings, config = driver.settings, driver.transformer.config
    scale = native_scale(settings, px.height, px.width)
    plan = Method(scale=scale).plan(settings, px.height, px.width)
    text = Text(random(1, plan.layout.text, config.joint_attention_dim), random(1, driver.pooled_size))
    driver.feed_forward_tokens = None if kind in ("windowed_eager", "windowed_compiled") else PART
    driver.keys_values_on_host = kind.startswith("windowed_low_memory")
    tokens, moment = random(1, plan.layout.image.tokens, config.in_channels), torch.full((1,), 0.5, device=DEVICE)
    draft = random(1, plan.layout.guidance_tokens, config.in_channels)
    guidance = driver.guidance_pass(draft, text.pooled, plan, GUIDANCE)
    return lambda: driver.image_pass(tokens, text, moment, plan, guidance, GUIDANCE)


class Run:
    """A pipeline with random weights, planned and prepared as `generate` does it."""

    def __init__(self, base: str, sizes: list[Side], steps: int | None, memory: Memory):
        settings = write_configs(base, Path(tempfile.mkdtemp()))
        self.steps = settings.steps if steps is None else steps
        method, self.sampling = Method(), Sampling(steps=self.steps, draft_steps=self.steps)
        pictures = [Picture(index, PROMPT, "", index, px.height, px.width) for index, px in enumerate(sizes)]
        self.plan = RunPlan(pictures, settings, method, self.sampling, memory, "auto", DEVICE, DTYPE)
        self.pipeline: ScaleDiTPipeline = random_pipeline(settings, draw_on=DEVICE)
        self.pipeline.method = method
        torch.cuda.empty_cache()
        self.plan.prepare(self.pipeline)
        print(self.plan.memory, flush=True)

    def make(self, px: Side, steps: int | None = None) -> StageCost:
        """Seconds and peak bytes by stage of one picture; of its text where that was encoded, also beforehand."""
        torch.cuda.empty_cache()
        steps = self.steps if steps is None else steps
        generator = torch.Generator().manual_seed(0)
        made: Any = self.pipeline(
            PROMPT, px.height, px.width, num_inference_steps=steps, draft_steps=steps, generator=generator,
            output_type="pt",
        )  # fmt: skip
        ahead = self.plan.actual.ahead
        return StageCost(made.cost.seconds | ahead.seconds, made.cost.peak_bytes | ahead.peak_bytes)

    def planned(self, px: Side) -> Prediction:
        """What was planned for one picture of several; its text as the first, if it was encoded beforehand."""
        found = self.plan.planner.predict(px.height, px.width, self.plan.memory)
        first = {stage: found.as_first().seconds[stage] for stage in self.plan.actual.ahead.seconds}
        return replace(found, seconds=found.seconds | first)


def measure_pictures(options: argparse.Namespace) -> None:
    """Whole pictures, or fewer steps of them, in the way that `memory=auto` chooses under a cap."""
    cap_memory(options.cap)
    run = Run(options.base, options.px, options.steps, Memory(limit_gb=options.cap and options.cap * 0.95))
    for px in options.px:
        run.make(px, 1)
        cost, planned = run.make(px), run.planned(px)
        rows = []
        for stage in planned.seconds:
            rows.append(
                {
                    "base": options.base, "px": px.label, "cap_gb": options.cap or "", "way": str(run.plan.memory),
                    "steps": run.steps,
                    "stage": stage, "seconds": f"{cost.seconds[stage]:.4f}",
                    "planned_seconds": f"{planned.seconds[stage]:.4f}",
                    "peak_gb": f"{cost.peak_bytes[stage] / 1e9:.3f}",
                    "planned_peak_gb": f"{planned.peak_bytes[stage] / 1e9:.3f}",
                }
            )  # fmt: skip
            print(*rows[-1].values(), flush=True)
        add_rows(options.to / "pictures.csv", rows, ("base", "px", "stage"))


def measure_least(options: argparse.Namespace) -> None:
    """The lowest cap, in whole GB, under which a picture is made with the least memory that leaves it as it is."""
    run = Run(options.base, options.px, 1, Memory("group", 4096, "host", "host"))
    for px in options.px:
        run.make(px)
        cost = run.make(px)
        allocated = max(peak for stage, peak in cost.peak_bytes.items() if stage != "text")
        cap = max(1, -(-allocated // 10**9))
        while True:
            cap_memory(cap)
            try:
                run.make(px)
                break
            except torch.OutOfMemoryError:
                print(f"{px.label} px do not fit into {cap} GB", flush=True)
                gc.collect()
                cap += 1
        cap_memory(None)
        planned = run.planned(px)
        row = {
            "base": options.base, "px": px.label, "way": str(run.plan.memory), "least_cap_gb": cap,
            "peak_gb": f"{allocated / 1e9:.3f}",
            "planned_peak_gb": f"{max(planned.peak_bytes[s] for s in ('draft', 'refine', 'decode')) / 1e9:.3f}",
            "text_peak_gb": f"{cost.peak_bytes['text'] / 1e9:.3f}",
            "refine_seconds_a_step": f"{cost.seconds['refine']:.3f}",
        }  # fmt: skip
        add_rows(options.to / "least.csv", [row], ("base", "px"))
        print(*row.values(), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, code in (("steps", measure_steps), ("pictures", measure_pictures), ("least", measure_least)):
        command = commands.add_parser(name, help=code.__doc__)
        command.set_defaults(code=code)
        command.add_argument("--px", type=Side.of, nargs="+", required=True, help="such as 4096 or 10240x4096")
        command.add_argument("--base", default=FIRST, choices=sorted(SHAPES["full"]))
        command.add_argument("--to", type=Path, default=HERE, help="folder of the table")
        if name == "steps":
            command.add_argument("--kinds", nargs="+", default=[*DENSE, *WINDOWED], choices=[*DENSE, *WINDOWED])
        if name == "pictures":
            command.add_argument("--steps", type=int, help="default: the base's")
            command.add_argument("--cap", type=float, help="GB of the card that may be used")
    options = parser.parse_args()
    need_gpu()
    pin_with_threads()
    options.code(options)


if __name__ == "__main__":
    main()
