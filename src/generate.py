"""Generate: prompts to pictures.

python src/generate.py base=tiny prompt='a large red circle left of a small blue star, on sand'
python src/generate.py base=tiny prompts_file=prompts.csv n=4 output=pictures
python src/generate.py experiment=scale_dit_4k prompt='a harbour at dawn' height=4096 width=4096
python src/generate.py base=tiny draft=photo.png start=0.6 prompt='a red circle on sand'
python src/generate.py remake=pictures/00000_seed0.png 'boxes=[[256,256,512,512]]' seed=1
python src/generate.py resume=pictures
"""

from __future__ import annotations

from scale_dit.starting import interruptible

with interruptible():
    import hydra
    from omegaconf import DictConfig

    from scale_dit.entry import entry_point, start
    from scale_dit.overrides import check_pick, quote_text_options
    from scale_dit.resuming import remake_arguments, resume_pictures


@hydra.main(version_base="1.3", config_path="../configs", config_name="generate")
@entry_point
def main(cfg: DictConfig) -> None:
    """Generate as configured, and print where the pictures are."""
    with interruptible():
        from scale_dit.generation.command import generate_pictures
    generate_pictures(cfg)


if __name__ == "__main__":
    start(main, check_pick, quote_text_options, resume_pictures, remake_arguments)
