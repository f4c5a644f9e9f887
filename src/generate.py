"""Generate: prompts to pictures.

python src/generate.py base=tiny prompt='a large red circle left of a small blue star, on sand'
python src/generate.py base=tiny prompts_file=prompts.csv n=4 output=pictures
python src/generate.py experiment=scale_dit_4k prompt='a harbour at dawn' height=4096 width=4096
"""

from __future__ import annotations

import sys
from typing import Any, cast

import hydra
from omegaconf import DictConfig, OmegaConf

from scale_dit.entry import entry_point
from scale_dit.evaluation.baselines import default_lora
from scale_dit.generation import Sampling, collect_pictures, collect_prompts, generate, quote_text_options
from scale_dit.lora_exchange import style_loras

SAMPLING = (
    "steps",
    "draft_steps",
    "guidance_scale",
    "draft_guidance_scale",
    "start",
    "low_pass",
    "scale",
    "decode_tile",
)
FOR_ALL = ("n", "seed", "height", "width", "negative_prompt")


@hydra.main(version_base="1.3", config_path="../configs", config_name="generate")
@entry_point
def main(cfg: DictConfig) -> None:
    """Generate as configured, and print where the pictures are."""
    values = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
    base, method = hydra.utils.instantiate(cfg.base), hydra.utils.instantiate(cfg.method)
    base.check_weights()
    prompts = collect_prompts(values["prompt"], values["prompts_file"])
    sampling = Sampling(**{name: values[name] for name in SAMPLING})
    pictures = collect_pictures(prompts, base, method, sampling, **{name: values[name] for name in FOR_ALL})
    files = generate(
        pictures, base, method, sampling, cfg.output,
        lora=default_lora(cfg.lora.path), lora_base=cfg.lora.base, style_loras=style_loras(values["style_loras"]),
        backend=cfg.attention.name, device=cfg.device, dtype=cfg.dtype,
        overwrite=cfg.overwrite, memory=hydra.utils.instantiate(cfg.memory), config=values,
    )  # fmt: skip
    print(*files, sep="\n")


if __name__ == "__main__":
    sys.argv[1:] = quote_text_options(sys.argv[1:])
    main()
