"""Make training pairs from a base: prompts to pictures, with their latents, drafts and text embeddings.

python src/make_pairs.py base=tiny prompts_file=prompts.csv n=4 output=pairs
python src/make_pairs.py resume=pairs
python src/train.py experiment=scale_dit_4k base=tiny data=pairs data.path=pairs
"""

from __future__ import annotations

import sys
from typing import Any, cast

import hydra
from omegaconf import DictConfig, OmegaConf

from scale_dit.entry import entry_point
from scale_dit.errors import UserError
from scale_dit.generation import (
    MAKE_PAIRS,
    Files,
    Job,
    PairSettings,
    Sampling,
    collect_pictures,
    collect_prompts,
    generate,
    quote_text_options,
    resume_arguments,
)
from scale_dit.messages import print_error
from scale_dit.method import Method

ALONE = Method(scale=1.0, windowed=False, guidance=False, order="raster")
"""The base by itself: one window over the whole picture, and no draft."""
FOR_ALL = ("n", "seed", "height", "width", "negative_prompt")
FILES = ("format", "quality", "save_every")


@hydra.main(version_base="1.3", config_path="../configs", config_name="make_pairs")
@entry_point
def main(cfg: DictConfig) -> None:
    """Make pairs as configured, and print how to train on them."""
    values = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
    base = hydra.utils.instantiate(cfg.base)
    base.check_weights()
    prompts = collect_prompts(values["prompt"], values["prompts_file"])
    sampling = Sampling(steps=values["steps"], guidance_scale=values["guidance_scale"], scale=1.0)
    pictures = collect_pictures(prompts, base, ALONE, sampling, **{name: values[name] for name in FOR_ALL})
    made = generate(
        pictures, base, ALONE, sampling, cfg.output,
        job=Job(shard=values["shard"], resume=values["resume"] is not None),
        files=Files(**{name: values[name] for name in FILES}), backend=cfg.attention.name, device=cfg.device,
        dtype=cfg.dtype, overwrite=cfg.overwrite, memory=hydra.utils.instantiate(cfg.memory),
        pairs=PairSettings(values["scales"], values["guidance_tokens"]), config=values,
    )  # fmt: skip
    print(f"{len(made)} of {len(pictures)} pairs are in {cfg.output}. Train on them with:")
    print(f"  python src/train.py experiment=... base={base.name} data=pairs data.path={cfg.output}")


if __name__ == "__main__":
    try:
        sys.argv[1:] = resume_arguments(quote_text_options(sys.argv[1:]), MAKE_PAIRS)
    except UserError as error:
        print_error(error)
        sys.exit(2)
    main()
