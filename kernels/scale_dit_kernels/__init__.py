"""Attention kernels of Scale-DiT and the float64 reference that they are tested against."""

from scale_dit_kernels.reference import masked_attention

__all__ = ["masked_attention"]
__version__ = "0.1.0"
