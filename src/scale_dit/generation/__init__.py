"""From prompts to picture files."""

from scale_dit.generation.files import Files
from scale_dit.generation.job import Job
from scale_dit.generation.loras import Loras
from scale_dit.generation.pairs import PairSettings
from scale_dit.generation.photo import DraftPhoto
from scale_dit.generation.pictures import Picture, Sampling, collect_pictures, collect_prompts
from scale_dit.generation.prompts import Prompt, read_prompts
from scale_dit.generation.remake import FinishedPicture, Remake
from scale_dit.generation.run import generate
from scale_dit.generation.window_prompts import read_window_prompts

__all__ = [
    "DraftPhoto",
    "Files",
    "FinishedPicture",
    "Job",
    "Loras",
    "PairSettings",
    "Picture",
    "Prompt",
    "Remake",
    "Sampling",
    "collect_pictures",
    "collect_prompts",
    "generate",
    "read_prompts",
    "read_window_prompts",
]
