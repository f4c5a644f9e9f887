"""Generate: prompts to pictures.

python src/generate.py base=tiny prompt='a large red circle left of a small blue star, on sand'
python src/generate.py base=tiny prompts_file=prompts.csv n=4 output=pictures
python src/generate.py experiment=scale_dit_4k prompt='a harbour at dawn' height=4096 width=4096
python src/generate.py base=tiny draft=photo.png start=0.6 prompt='a red circle on sand'
python src/generate.py remake=pictures/00000_seed0.png 'boxes=[[256,256,512,512]]' seed=1
python src/generate.py resume=pictures
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, cast

import hydra
from omegaconf import DictConfig, OmegaConf

from scale_dit.entry import entry_point
from scale_dit.errors import UserError
from scale_dit.evaluation.baselines import default_lora
from scale_dit.generation import (
    DraftPhoto,
    Files,
    Job,
    Loras,
    Remake,
    Sampling,
    collect_pictures,
    collect_prompts,
    generate,
    quote_text_options,
    read_window_prompts,
    remake_arguments,
    resume_arguments,
)
from scale_dit.lora_exchange import style_loras
from scale_dit.messages import print_error

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
FILES = ("format", "quality", "save_every", "keep_latents")


@hydra.main(version_base="1.3", config_path="../configs", config_name="generate")
@entry_point
def main(cfg: DictConfig) -> None:
    """Generate as configured, and print where the pictures are."""
    values = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
    base, method = hydra.utils.instantiate(cfg.base), hydra.utils.instantiate(cfg.method)
    base.check_weights()
    remake = Remake.of(values["remake"], values["boxes"], values["mask"])
    windows = None if values["window_prompts"] is None else read_window_prompts(values["window_prompts"])
    texts = values["prompt"], values["prompts_file"]
    prompts = [remake.prompt(windows)] if remake is not None and texts == (None, None) else collect_prompts(*texts)
    sampling = Sampling(**{name: values[name] for name in SAMPLING})
    files = Files(**{name: values[name] for name in FILES})
    job = Job(values["stage"], values["pick"], values["shard"], resume=values["resume"] is not None)
    photo = DraftPhoto(Path(values["draft"])) if values["draft"] is not None else None
    for_all = {name: values[name] for name in FOR_ALL}
    if remake is not None:
        for_all |= remake.size(for_all["height"], for_all["width"], base.token_size)
        if for_all["negative_prompt"] is None and remake.source.picture is not None:
            for_all["negative_prompt"] = remake.source.picture.negative_prompt
    pictures = collect_pictures(prompts, base, method, sampling, photo=photo, window_prompts=windows or (), **for_all)
    loras = Loras(default_lora(cfg.lora.path), cfg.lora.base, style_loras(values["style_loras"]))
    made = generate(
        pictures, base, method, sampling, cfg.output,
        loras=loras, photo=photo, remake=remake, job=job, files=files, backend=cfg.attention.name,
        device=cfg.device, dtype=cfg.dtype, overwrite=cfg.overwrite, memory=hydra.utils.instantiate(cfg.memory),
        config=values,
    )  # fmt: skip
    print(*made, sep="\n")


if __name__ == "__main__":
    try:
        sys.argv[1:] = remake_arguments(resume_arguments(quote_text_options(sys.argv[1:])))
    except UserError as error:
        print_error(error)
        sys.exit(2)
    main()
