"""From the configs of `src/generate.py` and `src/make_pairs.py` to files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import hydra
from omegaconf import DictConfig, OmegaConf

from scale_dit.evaluation.baselines import default_lora
from scale_dit.generation.folder import Files
from scale_dit.generation.job import Job
from scale_dit.generation.loras import Loras
from scale_dit.generation.pairs import PairSettings
from scale_dit.generation.photo import DraftPhoto
from scale_dit.generation.pictures import Sampling, collect_pictures, collect_prompts, warn_of_unread_negatives
from scale_dit.generation.remake import Remake
from scale_dit.generation.run import generate
from scale_dit.generation.window_prompts import read_window_prompts
from scale_dit.lora_exchange import style_loras
from scale_dit.method import Method
from scale_dit.models.weights_folder import transformer_config
from scale_dit.sampling import warn_of_unread_scales

SAMPLING = (
    "steps",
    "draft_steps",
    "guidance_scale",
    "draft_guidance_scale",
    "start",
    "low_pass",
    "low_pass_schedule",
    "low_pass_until",
    "scale",
    "wrap",
    "decode_tile",
)
FOR_ALL = ("n", "seed", "height", "width", "negative_prompt")
FILES = ("format", "quality", "save_every")
ALONE = Method(scale=1.0, windowed=False, guidance=False, order="raster")
"""The base by itself: one window over the whole picture, and no draft."""


def generate_pictures(cfg: DictConfig) -> None:
    """Generate as configured, and print where the pictures are.

    Raises:
        UserError: What cannot be, before weights are loaded.
    """
    values = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
    base, method = hydra.utils.instantiate(cfg.base), hydra.utils.instantiate(cfg.method)
    base.check_weights()
    remake = Remake.of(values["remake"], values["boxes"], values["mask"])
    windows = None if values["window_prompts"] is None else read_window_prompts(values["window_prompts"])
    texts = values["prompt"], values["prompts_file"]
    prompts = [remake.prompt(windows)] if remake is not None and texts == (None, None) else collect_prompts(*texts)
    sampling = Sampling(**{name: values[name] for name in SAMPLING})
    config = transformer_config(base.path)
    warn_of_unread_scales(base, config, sampling.guidance_scale, sampling.draft_guidance_scale)
    files = Files(**{name: values[name] for name in (*FILES, "keep_latents")})
    job = Job(values["stage"], values["pick"], values["shard"], resume=values["resume"] is not None)
    photo = DraftPhoto(Path(values["draft"])) if values["draft"] is not None else None
    for_all = {name: values[name] for name in FOR_ALL}
    if remake is not None:
        for_all |= remake.size(for_all["height"], for_all["width"], base.token_size)
        if for_all["negative_prompt"] is None and remake.source.picture is not None:
            for_all["negative_prompt"] = remake.source.picture.negative_prompt
    pictures = collect_pictures(prompts, base, method, sampling, photo=photo, window_prompts=windows or (), **for_all)
    if values["negative_prompt"] or any(
        prompt.negative_prompt for prompt in prompts
    ):  # given, not the remade picture's
        drafting = photo is None and remake is None
        warn_of_unread_negatives(pictures, base, method, sampling, drafting=drafting)
    loras = Loras(default_lora(cfg.lora.path), cfg.lora.base, style_loras(values["style_loras"]))
    made = generate(
        pictures, base, method, sampling, cfg.output,
        loras=loras, photo=photo, remake=remake, job=job, files=files, backend=cfg.attention.name,
        device=cfg.device, dtype=cfg.dtype, overwrite=cfg.overwrite, memory=hydra.utils.instantiate(cfg.memory),
        config=values,
    )  # fmt: skip
    print(*made, sep="\n")


def make_pairs(cfg: DictConfig) -> None:
    """Make pairs as configured, and print how to train on them.

    Raises:
        UserError: What cannot be, before weights are loaded.
    """
    values = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
    base = hydra.utils.instantiate(cfg.base)
    base.check_weights()
    prompts = collect_prompts(values["prompt"], values["prompts_file"])
    sampling = Sampling(steps=values["steps"], guidance_scale=values["guidance_scale"], scale=1.0)
    warn_of_unread_scales(base, transformer_config(base.path), sampling.guidance_scale)
    pictures = collect_pictures(prompts, base, ALONE, sampling, **{name: values[name] for name in FOR_ALL})
    warn_of_unread_negatives(pictures, base, ALONE, sampling)
    made = generate(
        pictures, base, ALONE, sampling, cfg.output,
        job=Job(shard=values["shard"], resume=values["resume"] is not None),
        files=Files(**{name: values[name] for name in FILES}), backend=cfg.attention.name, device=cfg.device,
        dtype=cfg.dtype, overwrite=cfg.overwrite, memory=hydra.utils.instantiate(cfg.memory),
        pairs=PairSettings(values["scales"], values["guidance_tokens"]), config=values,
    )  # fmt: skip
    print(f"{len(made)} of {len(pictures)} pairs are in {cfg.output}. Train on them with:")
    print(f"  python src/train.py experiment=... base={base.name} data=pairs data.path={cfg.output}")
