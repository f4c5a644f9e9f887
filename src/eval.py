"""Evaluate: the method beside its baselines, on the same prompts and seeds.

python src/eval.py base=tiny +baseline=dense
python src/eval.py base=tiny '+baseline=[dense,no_lora,no_guidance,bicubic]' n=200
"""

from __future__ import annotations

from scale_dit.starting import interruptible

with interruptible():
    import hydra
    from omegaconf import DictConfig

    from scale_dit.entry import entry_point, start


@hydra.main(version_base="1.3", config_path="../configs", config_name="eval")
@entry_point
def main(cfg: DictConfig) -> None:
    """Evaluate as configured."""
    with interruptible():
        from scale_dit.evaluation.entry import evaluate_config
    evaluate_config(cfg)


if __name__ == "__main__":
    start(main)
