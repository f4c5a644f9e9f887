"""Make training pairs from a base: prompts to pictures, with their latents, drafts and text embeddings.

python src/make_pairs.py base=tiny prompts_file=prompts.csv n=4 output=pairs
python src/make_pairs.py resume=pairs
python src/train.py experiment=scale_dit_4k base=tiny data=pairs data.path=pairs
"""

from __future__ import annotations

from functools import partial

from scale_dit.starting import interruptible

with interruptible():
    import hydra
    from omegaconf import DictConfig

    from scale_dit.entry import entry_point, start
    from scale_dit.overrides import quote_text_options
    from scale_dit.resuming import MAKE_PAIRS, resume_pictures


@hydra.main(version_base="1.3", config_path="../configs", config_name="make_pairs")
@entry_point
def main(cfg: DictConfig) -> None:
    """Make pairs as configured, and print how to train on them."""
    with interruptible():
        from scale_dit.generation.command import make_pairs
    make_pairs(cfg)


if __name__ == "__main__":
    start(main, quote_text_options, partial(resume_pictures, program=MAKE_PAIRS))
