"""Making pictures: load the base once, then draft, refine, decode and write one after the other."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from scale_dit.autoencoder import Decoding
from scale_dit.data.cache_store import weights_fingerprint
from scale_dit.device import choose_device
from scale_dit.generation.folder import OutputFolder
from scale_dit.generation.pictures import Picture, Sampling
from scale_dit.generation.progress import DECODE_STEPS, GenerationProgress
from scale_dit.lora import check_record, file_digest, has_record, read_lora
from scale_dit.lora_exchange import StyleLora, read_foreign_lora
from scale_dit.method import Method
from scale_dit.models import load_family
from scale_dit.models.settings import BaseSettings
from scale_dit.pipeline import ScaleDiTPipeline
from scale_dit.planning.memory import Memory
from scale_dit.planning.run import RunPlan
from scale_dit.run_record import write_run_record

INTERRUPTED_STATUS = 130
WEIGHTS = ("transformer", "vae", "text_encoder", "text_encoder_2")


def generate(
    pictures: Sequence[Picture],
    base: BaseSettings,
    method: Method,
    sampling: Sampling,
    output: str | Path,
    *,
    lora: str | Path | None = None,
    lora_base: str | None = None,
    style_loras: Sequence[StyleLora] = (),
    backend: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    overwrite: bool = False,
    memory: Memory | None = None,
    config: dict[str, Any] | None = None,
    console: Console | None = None,
) -> list[Path]:
    """Make pictures and write them as PNG files whose text metadata says what they were made with.

    Pictures of an interrupted run with the same settings are not made again.

    Args:
        lora: File or folder of the base's LoRA; `None`: none.
        lora_base: Name of the base that a LoRA by others, which does not say so, was trained for.
        style_loras: Further LoRAs, which act on all tokens.
        output: Folder of the pictures.
        overwrite: Remove the pictures of an earlier run from it.
        memory: How memory is saved; by default as far as it has to be.
        config: The resolved config, left in `run.json` beside the pictures.

    Returns:
        The files, in the order of `pictures`.

    Raises:
        UserError: Settings, a LoRA, a device or a folder that cannot be, before weights are loaded; a full disk.
        SystemExit: Ctrl-C, after a message that says how to go on.
    """
    console = console or Console()
    sampling.check(base)
    place, kind = choose_device(device, dtype)
    settings: dict[str, Any] = {"base": asdict(base), "method": asdict(method), "sampling": asdict(sampling)}
    settings |= {"dtype": str(kind), "weights": _weights_digest(base), "lora": _lora_digest(lora, base, lora_base)}
    settings["style_loras"] = [_style_record(style, base) for style in style_loras]
    folder = OutputFolder(Path(output), settings)
    pending = folder.pending(pictures, overwrite)
    write_run_record(folder.path, config or settings, pictures[0].seed)
    if len(pending) < len(pictures):
        console.print(f"{len(pictures) - len(pending)} of {len(pictures)} pictures are there already")
    if pending:
        plan = RunPlan(pending, base, method, sampling, memory or Memory(), backend, place, kind)
        plan.show(console)
        pipeline = _load(base, method, sampling, backend, kind)
        if lora is not None:
            pipeline.load_lora_weights(lora, base=lora_base)
        for style in style_loras:
            pipeline.load_lora_weights(style.path, style.adapter, weight=style.weight)
        plan.prepare(pipeline)
        if not _make_all(pipeline, pending, sampling, folder, console, plan):
            console.print(f"Interrupted. The same command with output={folder.path} goes on.", markup=False)
            sys.exit(INTERRUPTED_STATUS)
        plan.show_actual(console)
    folder.finish(pictures)
    return [folder.path / picture.file_name for picture in pictures]


def _make_all(
    pipeline: ScaleDiTPipeline,
    pictures: Sequence[Picture],
    sampling: Sampling,
    folder: OutputFolder,
    console: Console,
    plan: RunPlan,
) -> bool:
    """Make and write pictures; `False` if Ctrl-C stopped it."""
    work = [_work(pipeline, picture, sampling) for picture in pictures]
    try:
        with GenerationProgress(work, console) as progress:
            for picture in pictures:
                plan.note(picture, **_make(pipeline, picture, sampling, folder, progress))
    except KeyboardInterrupt:
        return False
    return True


def _weights_digest(base: BaseSettings) -> str | None:
    return weights_fingerprint(base.path, WEIGHTS) if Path(base.path).is_dir() else None


def _lora_digest(path: str | Path | None, base: BaseSettings, given_base: str | None) -> str | None:
    """The digest of a LoRA, after it was seen to be one of this base's."""
    if path is None:
        return None
    record = {"base": given_base} if given_base is not None and not has_record(path) else read_lora(path)[1]
    check_record(record, base.name, {})
    return file_digest(path)


def _style_record(style: StyleLora, base: BaseSettings) -> list[object]:
    """Digest and weight of a style, after its file was seen to be one of this base's family."""
    read_foreign_lora(style.path, load_family(base).stock)
    return [file_digest(style.path), style.weight]


def _load(
    base: BaseSettings,
    method: Method,
    sampling: Sampling,
    backend: str,
    dtype: torch.dtype,
) -> ScaleDiTPipeline:
    """The pipeline in host memory."""
    pipeline = ScaleDiTPipeline.from_pretrained(base.path, settings=base, dtype=dtype)
    pipeline.configure(base, backend)
    pipeline.method = method
    pipeline.decoding = Decoding(tile=sampling.decode_tile, overlap=sampling.decode_tile // 4)
    return pipeline


def _work(pipeline: ScaleDiTPipeline, picture: Picture, sampling: Sampling) -> dict[str, float]:
    """Tokens times steps of each stage of one picture."""
    settings, size = pipeline.settings, (picture.height, picture.width)
    scale = sampling.scale_for(settings, *size)
    layout = replace(pipeline.method, scale=scale).plan(settings, *size).layout
    refine_step = layout.text + layout.image.tokens
    work = {"refine": (sampling.steps or settings.steps) * refine_step, "decode": DECODE_STEPS * refine_step}
    if layout.guidance is None and sampling.start == 1 and sampling.low_pass == 0:
        return work
    draft = pipeline.draft_plan(*size, scale).layout
    return {"draft": (sampling.draft_steps or settings.steps) * (draft.text + draft.image.tokens), **work}


def _make(
    pipeline: ScaleDiTPipeline, picture: Picture, sampling: Sampling, folder: OutputFolder, progress: GenerationProgress
) -> Mapping[str, Any]:
    """Make and write one picture; returns its seconds and peak bytes by stage."""
    progress.begin()
    result: Any = pipeline(
        picture.prompt,
        picture.height,
        picture.width,
        negative_prompt=picture.negative_prompt,
        num_inference_steps=sampling.steps,
        draft_steps=sampling.draft_steps,
        guidance_scale=sampling.guidance_scale,
        draft_guidance_scale=sampling.draft_guidance_scale,
        start=sampling.start,
        low_pass=sampling.low_pass,
        scale=sampling.scale_for(pipeline.settings, picture.height, picture.width),
        generator=torch.Generator().manual_seed(picture.seed),
        output_type="pt",
        progress=progress.step,
    )
    cost: Mapping[str, Any] = {"seconds": result.cost.seconds, "peak_bytes": result.cost.peak_bytes}
    folder.keep(picture, result.images[0], cost)
    progress.end()
    return cost
