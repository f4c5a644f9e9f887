"""How to go on in the folder of pictures or of pairs."""

from scale_dit.resuming import GENERATE, MAKE_PAIRS, resume_command

__all__ = ["GENERATE", "MAKE_PAIRS", "resume_command"]
