"""Scale-DiT: 4K and 8K pictures from a diffusion transformer that was trained at 1K (arXiv 2510.16325)."""

from omegaconf import OmegaConf

from scale_dit.provenance import path_of_project

__version__ = "0.1.0"

# `${project:}` in the configs: the checkout, wherever a command is run.
OmegaConf.register_new_resolver("project", path_of_project, replace=True)
