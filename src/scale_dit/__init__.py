"""Scale-DiT: 4K and 8K pictures from a diffusion transformer that was trained at 1K (arXiv 2510.16325)."""

__version__ = "0.1.0"
