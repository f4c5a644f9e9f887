"""Arms of an evaluation: the method, and what it is compared with. Each is one class or one set of switches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from scale_dit.errors import UserError
from scale_dit.evaluation.arms import Arm, ArmOutput
from scale_dit.lora import file_digest
from scale_dit.method import Method
from scale_dit.pipeline import ScaleDiTPipeline
from scale_dit.pipeline_output import ScaleDiTOutput


@dataclass
class Setting:
    """What all arms of one evaluation share.

    Args:
        pipeline: Over the base, without a LoRA.
        method: The method as configured.
        lora: Its LoRA file or folder, or `None`.
        height, width: Of the pictures, in px.
        lora_base: Name of the base that a LoRA by others, which does not say so, was trained for.
        start, steps, draft_steps, guidance_scale, draft_guidance_scale: As in `ScaleDiTPipeline.__call__`.
    """

    pipeline: ScaleDiTPipeline
    method: Method
    lora: str | None
    height: int
    width: int
    lora_base: str | None = None
    start: float = 1.0
    steps: int | None = None
    draft_steps: int | None = None
    guidance_scale: float | None = None
    draft_guidance_scale: float | None = None
    drafts: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """Plain values that decide what the pictures look like."""
        values = {key: getattr(self, key) for key in ("height", "width", "steps", "draft_steps")}
        values |= {key: getattr(self, key) for key in ("guidance_scale", "draft_guidance_scale")}
        return values | {"base": asdict(self.pipeline.settings), "weights": weights_digest(self.pipeline.transformer)}


class Baseline(Protocol):
    """Anything that a config in `configs/baseline` can name."""

    def arm(self, setting: Setting) -> Arm:
        """The arm for an evaluation's setting."""
        ...


@dataclass(frozen=True)
class Variant:
    """The method with some of its switches turned.

    Args:
        method: Fields of `Method` to change, such as `{windowed: false, guidance: false}` for dense attention.
        lora: Whether the LoRA is loaded.
        start: Noise level at which refinement starts; `None` is the evaluation's.
    """

    method: Mapping[str, Any] = field(default_factory=dict)
    lora: bool = True
    start: float | None = None

    def arm(self, setting: Setting) -> Arm:
        """Generate with the switches turned."""
        changed = replace(setting.method, **self.method)
        changed.plan(setting.pipeline.settings, setting.height, setting.width)
        start = setting.start if self.start is None else self.start
        lora = setting.lora if self.lora and changed.guidance else None
        record = setting.record() | {"method": asdict(changed), "start": start if changed.guidance else 1.0}
        record["lora"] = file_digest(lora) if lora else None
        return Arm(partial(_generate, setting, changed, lora, record["start"]), record)


def _generate(
    setting: Setting, method: Method, lora: str | None, start: float, prompts: list[str], seeds: list[int]
) -> ArmOutput:
    pipeline = setting.pipeline
    pipeline.method = method
    if pipeline.lora_path != lora:
        pipeline.unload_lora_weights()
        if lora:
            pipeline.load_lora_weights(lora, base=setting.lora_base)
    output = pipeline(
        prompts,
        setting.height,
        setting.width,
        num_inference_steps=setting.steps,
        draft_steps=setting.draft_steps,
        guidance_scale=setting.guidance_scale,
        draft_guidance_scale=setting.draft_guidance_scale,
        start=start,
        scale=method.scale,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="pt",
    )
    assert isinstance(output, ScaleDiTOutput)
    drafts = pipeline.decode(output.draft_latents) if output.draft_latents is not None else None
    return ArmOutput(output.images, output.cost.seconds, output.cost.peak_bytes, drafts)


@dataclass(frozen=True)
class Bicubic:
    """The native-size draft, enlarged bicubically: what any picture of the method must beat in detail."""

    def arm(self, setting: Setting) -> Arm:
        """Make drafts and enlarge them."""
        return Arm(partial(_enlarge, setting), setting.record() | {"arm": "bicubic"})


def _enlarge(setting: Setting, prompts: list[str], seeds: list[int]) -> ArmOutput:
    pipeline = setting.pipeline
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    latents, cost = pipeline.make_drafts(
        prompts, setting.height, setting.width, setting.method.scale, setting.draft_steps,
        setting.draft_guidance_scale, generators,
    )  # fmt: skip
    drafts = pipeline.decode(latents)
    size = (setting.height, setting.width)
    images = torch.nn.functional.interpolate(drafts, size=size, mode="bicubic").clamp(0, 1)
    return ArmOutput(images, cost.seconds, cost.peak_bytes, drafts)


def choose_arms(baselines: Mapping[str, Baseline], setting: Setting, only: list[str] | None = None) -> dict[str, Arm]:
    """The method's arm, `scale_dit`, and the baselines', or those of them that `only` names.

    Raises:
        UserError: `only` names an arm that is not there.
    """
    makers: dict[str, Baseline] = {"scale_dit": Variant()} | dict(baselines)
    unknown = [name for name in only or [] if name not in makers]
    if unknown:
        raise UserError(
            f"there is no arm {unknown[0]!r}: the arms are {', '.join(makers)}; add one with +baseline=[...]"
        )
    return {name: maker.arm(setting) for name, maker in makers.items() if only is None or name in only}


def weights_digest(module: torch.nn.Module) -> str:
    """A short digest of a module's weights, so that pictures of other weights are not taken for these."""
    import hashlib

    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if ".lora_" not in name:
            digest.update(f"{name}{tuple(tensor.shape)}{float(tensor.double().sum()):.6e}".encode())
    return digest.hexdigest()[:12]


def default_lora(path: str | None) -> str | None:
    """A configured LoRA path: null and `none` are no LoRA.

    Raises:
        UserError: It does not exist.
    """
    if path is None or str(path).lower() == "none":
        return None
    if not Path(path).exists():
        raise UserError(
            f"LoRA {path} does not exist: train one with `python src/train.py experiment=scale_dit_4k base=tiny`, give "
            f"its folder with lora.path=..., or go without with lora.path=none"
        )
    return str(path)
