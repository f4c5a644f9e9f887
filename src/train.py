"""Train: the Scale-DiT LoRA on a base, or the embedded base itself.

python src/train.py experiment=scale_dit_4k base=tiny
python src/train.py experiment=tiny_vae
python src/train.py experiment=tiny_base
python src/train.py resume=logs/scale_dit_4k/runs/<time>
python src/train.py --multirun base=tiny experiment=scale_dit_4k order=hilbert,raster trainer.max_steps=20
"""

from __future__ import annotations

from scale_dit.starting import interruptible

with interruptible():
    import hydra
    from omegaconf import DictConfig

    from scale_dit.entry import entry_point, start
    from scale_dit.resuming import resume_training


@hydra.main(version_base="1.3", config_path="../configs", config_name="train")
@entry_point
def main(cfg: DictConfig) -> float | None:
    """Train as configured; a sweep gets the last training loss."""
    with interruptible():
        from scale_dit.training import train
    metrics, _ = train(cfg)
    return metrics.get("train/loss")


if __name__ == "__main__":
    start(main, resume_training)
