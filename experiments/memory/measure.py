"""Seconds and peak memory of a full base's shape on one GPU, beside what was planned. Each command takes below 500 s.

python experiments/memory/measure.py steps --px 4096
python experiments/memory/measure.py steps --px 8192 --kinds stock_eager windowed_parts
python experiments/memory/measure.py pictures --px 2048 4096 6144 10240x4096
python experiments/memory/measure.py pictures --px 8192 --steps 8
python experiments/memory/measure.py pictures --px 2048 4096 8192 --steps 1 --cap 40
python experiments/memory/measure.py least --px 2048 4096 8192
python experiments/memory/measure.py pictures --base klein_9b --px 4096 8192
python experiments/memory/run.py

Caps are enforced with `torch.cuda.set_per_process_memory_fraction`. Rows go to steps.csv, pictures.csv and least.csv
in this folder, or in the one that --to names.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from scale_dit.benchmark.timing import need_gpu
from scale_dit.evaluation.studies import add_rows
from scale_dit.generation.pictures import Picture, Sampling
from scale_dit.method import Method
from scale_dit.models.driver import Driver
from scale_dit.models.random_weights import base_settings, random_part, random_pipeline, write_configs
from scale_dit.models.shapes import SHAPES, shape_of
from scale_dit.models.text import Text
from scale_dit.pipeline import ScaleDiTPipeline
from scale_dit.planning.components import Components
from scale_dit.planning.memory import PART, Memory
from scale_dit.planning.run import RunPlan
from scale_dit.recipe import native_scale

HERE = Path(__file__).parent
DEVICE, DTYPE = torch.device("cuda", 0), torch.bfloat16
PROMPT = "a harbour at dawn"
GUIDANCE = 3.5
BASES = [name for name, sizes in SHAPES.items() if "full" in sizes]
DENSE = "stock_eager", "stock_compiled"
WINDOWED = "windowed_eager", "windowed_parts", "windowed_low_memory", "windowed_compiled"


Size = tuple[int, int]
"""Height and width in px."""


def size_of(text: str) -> Size:
    """`4096`, or width x height as `10240x4096`."""
    width, _, height = text.partition("x")
    return int(height or width), int(width)


def name_of(height: int, width: int) -> str:
    """A size as it is asked for."""
    return f"{width}" if width == height else f"{width}x{height}"


def cap_memory(gb: float | None) -> None:
    """Let torch have no more than `gb` GB of the card; `None`: all of it."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(1.0 if gb is None else min(1.0, gb * 1e9 / total))


def peak_and_seconds(code: Callable[[], object]) -> tuple[float, float]:
    """GB at most, and seconds, of a call that ran once before."""
    code()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    code()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 1e9, time.perf_counter() - began


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=DTYPE)


@torch.no_grad()
def measure_steps(options: argparse.Namespace) -> None:
    """One denoising step of the picture: stock and windowed, eager and compiled, weights on the card."""
    settings = base_settings(options.base)
    transformer = random_part(shape_of(options.base, "full")["transformer"], DEVICE)
    stock = dict(transformer.attn_processors)
    for size, kind in product(options.px, options.kinds):
        driver = Components({"transformer": transformer}).driver(settings, "auto")
        if kind in DENSE:
            transformer.set_attn_processor(dict(stock))
        step = _stock_step(driver, *size) if kind in DENSE else _windowed_step(driver, *size, kind)
        if kind.endswith("compiled"):
            for block in driver.blocks:
                block.compile()
        peak, seconds = peak_and_seconds(step)
        for block in driver.blocks:
            block._compiled_call_impl = None
        torch._dynamo.reset()
        row = {
            "base": options.base, "px": name_of(*size), "kind": kind, "seconds": f"{seconds:.4f}",
            "peak_gb": f"{peak:.3f}",
        }  # fmt: skip
        add_rows(options.to / "steps.csv", [row], ("base", "px", "kind"))
        print(*row.values(), flush=True)
        del step, driver
        gc.collect()
        torch.cuda.empty_cache()


def _stock_step(driver: Driver, height: int, width: int) -> Callable[[], object]:
    """The transformer as it is, over text and image."""
    config, length = driver.transformer.config, driver.settings.text_length
    tokens = (height // driver.settings.token_size) * (width // driver.settings.token_size)
    inputs: dict[str, Tensor] = {
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


def _windowed_step(driver: Driver, height: int, width: int, kind: str) -> Callable[[], object]:
    settings, channels = driver.settings, driver.transformer.config.in_channels
    plan = Method(scale=native_scale(settings, height, width)).plan(settings, height, width)
    text = Text(
        random(1, plan.layout.text, driver.transformer.config.joint_attention_dim), random(1, driver.pooled_size)
    )
    driver.feed_forward_tokens = PART if kind in ("windowed_parts", "windowed_low_memory") else None
    driver.keys_values_on_host = kind == "windowed_low_memory"
    guidance = driver.guidance_pass(random(1, plan.layout.guidance_tokens, channels), text.pooled, plan, GUIDANCE)
    tokens, moment = random(1, plan.layout.image.tokens, channels), torch.full((1,), 0.5, device=DEVICE)
    return lambda: driver.image_pass(tokens, text, moment, plan, guidance, GUIDANCE)


class Run:
    """A pipeline with random weights, planned and prepared as `generate` does it."""

    def __init__(self, base: str, sizes: list[Size], steps: int | None, memory: Memory):
        settings = write_configs(base, Path(tempfile.mkdtemp()))
        self.steps, self.full_steps = steps or settings.steps, settings.steps
        method, sampling = Method(), Sampling(steps=self.steps, draft_steps=self.steps)
        pictures = [Picture(index, PROMPT, "", index, *size) for index, size in enumerate(sizes)]
        self.plan = RunPlan(pictures, settings, method, sampling, memory, "auto", DEVICE, DTYPE)
        self.pipeline: ScaleDiTPipeline = random_pipeline(settings, draw_on=DEVICE)
        self.pipeline.method = method
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self.plan.prepare(self.pipeline)
        self.text_peak = torch.cuda.max_memory_allocated()
        print(self.plan.memory, flush=True)

    def make(self, size: Size) -> Any:
        """Seconds and peak bytes by stage of one picture, whose kernels ran before."""
        self._once(size, 1)
        return self._once(size, self.steps)

    def _once(self, size: Size, steps: int) -> Any:
        torch.cuda.empty_cache()
        return self.pipeline(
            PROMPT, *size, num_inference_steps=steps, draft_steps=steps, output_type="pt",
            generator=torch.Generator().manual_seed(0),
        ).cost  # fmt: skip


def measure_pictures(options: argparse.Namespace) -> None:
    """Whole pictures, or fewer steps of them, in the way that `memory=auto` chooses under a cap."""
    cap_memory(options.cap)
    run = Run(options.base, options.px, options.steps, Memory(limit_gb=options.cap and options.cap * 0.95))
    for size in options.px:
        cost = run.make(size)
        planned = run.plan.planner.predict(*size, run.plan.memory)
        rows = []
        for stage in planned.seconds:
            peak = max(cost.peak_bytes[stage], run.text_peak if stage == "text" else 0)
            rows.append(
                {
                    "base": options.base, "px": name_of(*size), "cap_gb": options.cap or "",
                    "way": str(run.plan.memory), "steps": run.steps, "full_steps": run.full_steps,
                    "stage": stage, "seconds": f"{cost.seconds[stage]:.4f}",
                    "planned_seconds": f"{planned.seconds[stage]:.4f}", "peak_gb": f"{peak / 1e9:.3f}",
                    "planned_peak_gb": f"{planned.peak_bytes[stage] / 1e9:.3f}",
                }
            )  # fmt: skip
            print(*rows[-1].values(), flush=True)
        add_rows(options.to / "pictures.csv", rows, ("base", "px", "stage"))


def measure_least(options: argparse.Namespace) -> None:
    """The lowest cap, in whole GB, under which a picture is made with the least memory that leaves it as it is."""
    run = Run(options.base, options.px, 1, Memory("group", 4096, "host", "host"))
    for size in options.px:
        cost, px = run.make(size), name_of(*size)
        allocated = max(cost.peak_bytes.values())
        cap = max(1, -(-allocated // 10**9))
        while True:
            cap_memory(cap)
            try:
                run.make(size)
                break
            except torch.OutOfMemoryError:
                print(f"{px} px do not fit into {cap} GB", flush=True)
                gc.collect()
                cap += 1
        cap_memory(None)
        planned = run.plan.planner.predict(*size, run.plan.memory)
        row = {
            "base": options.base, "px": px, "way": str(run.plan.memory), "least_cap_gb": cap,
            "peak_gb": f"{allocated / 1e9:.3f}",
            "planned_peak_gb": f"{max(planned.peak_bytes[s] for s in ('draft', 'refine', 'decode')) / 1e9:.3f}",
            "text_peak_gb": f"{run.text_peak / 1e9:.3f}", "refine_seconds_a_step": f"{cost.seconds['refine']:.3f}",
        }  # fmt: skip
        add_rows(options.to / "least.csv", [row], ("base", "px"))
        print(*row.values(), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, code in (("steps", measure_steps), ("pictures", measure_pictures), ("least", measure_least)):
        command = commands.add_parser(name, help=code.__doc__)
        command.set_defaults(code=code)
        command.add_argument("--base", default="flux1_dev", choices=BASES, help="whose shape")
        command.add_argument("--px", type=size_of, nargs="+", required=True, help="such as 4096 or 10240x4096")
        command.add_argument("--to", type=Path, default=HERE, help="folder of the table")
        if name == "steps":
            command.add_argument("--kinds", nargs="+", default=[*DENSE, *WINDOWED], choices=[*DENSE, *WINDOWED])
        if name == "pictures":
            command.add_argument("--steps", type=int, help="fewer than the base's: times are extrapolated")
            command.add_argument("--cap", type=float, help="GB of the card that may be used")
    options = parser.parse_args()
    need_gpu()
    options.code(options)


if __name__ == "__main__":
    main()
