"""Time the kernels beside what a user could install instead: correct outputs first, then interleaved.

python src/benchmark.py kernel=attention
python src/benchmark.py kernel=attention 'kernel.sizes=[1024,4096]' 'kernel.patterns=[official]' kernel.passes=[forward]
python src/benchmark.py kernel=norm_rotate
"""

from __future__ import annotations

from pathlib import Path

from scale_dit.starting import interruptible

with interruptible():
    import hydra
    from omegaconf import DictConfig

    from scale_dit.entry import entry_point, start


@hydra.main(version_base="1.3", config_path="../configs", config_name="benchmark")
@entry_point
def main(cfg: DictConfig) -> None:
    """Run the benchmark that `kernel` names."""
    hydra.utils.instantiate(cfg.kernel, _convert_="all").run(Path(cfg.to))


if __name__ == "__main__":
    start(main)
