"""CLIP score (Hessel et al. 2021) through open_clip, with weights from a local file."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scale_dit.evaluation.features import default_device
from scale_dit.evaluation.intervals import bootstrap_mean
from scale_dit.evaluation.metric import Figure, PictureMetric, Record
from scale_dit.picture_files import to_uint8


class ClipScore(PictureMetric):
    """100 * max(cosine of picture and text, 0), averaged over pictures, and the share of texts that were cut.

    The network reads 77 tokens. Texts are cut in the tokenizer, which keeps the end token: a text cut anywhere else
    loses the token that CLIP reads the sentence from, and scores far too low.

    Args:
        weights: the weight file, or a folder that holds `<architecture>.pt` or `.safetensors`.
        architecture: open_clip's name. OpenAI's weights need a `-quickgelu` architecture; with another they load and
            give wrong scores.
        device: where it runs; a GPU if there is one, by default.
    """

    name = "clip_score"

    def __init__(
        self, weights: str | None = None, architecture: str = "ViT-B-16-quickgelu", device: str | None = None
    ) -> None:
        super().__init__()
        self.needs = ("the package open_clip_torch", f"weights of {architecture}")
        self.place = weights
        self.architecture = architecture
        self.device = torch.device(device) if device else default_device()

    def available(self) -> str | None:
        """What keeps the score from being computed: a package, the weight file, or an architecture that is not its."""
        if find_spec("open_clip") is None:
            return "CLIP score needs the package open_clip_torch: pip install open_clip_torch"
        path = self._weights_file()
        if path is None:
            wanted = " or ".join(self._file_names())
            return (
                f"CLIP weights not found. Put {wanted} (for instance OpenAI's ViT-B-16.pt) into a folder and name it, "
                "or the file, as `weights` of this metric (or in the environment variable SCALE_DIT_WEIGHTS)"
            )
        if is_torchscript(path) and not self.architecture.endswith("-quickgelu"):
            return (
                f"{path} is a file of OpenAI's, which was trained with another activation: set `architecture` to "
                f"{self.architecture}-quickgelu"
            )
        return None

    def update(self, arm: str, images: Tensor, prompts: Sequence[str], records: Sequence[Record]) -> None:
        """Score pictures with their prompts."""
        scores, cut = self.score(images, prompts)
        for record, value, too_long in zip(records, scores.tolist(), cut, strict=True):
            self._add(arm, self.name, record.index, value)
            self._add(arm, "clip_text_cut", record.index, float(too_long))

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, list[bool]]:
        """Scores `[B]` of pictures `[B, 3, H, W]` with their texts, and whether each text was cut."""
        from PIL import Image

        model, preprocess, tokenizer = self._loaded
        pixels = to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()
        inputs = torch.stack([preprocess(Image.fromarray(picture)) for picture in pixels]).to(self.device)
        seen = model.encode_image(inputs, normalize=True)
        read = model.encode_text(tokenizer(list(prompts)).to(self.device), normalize=True)
        scores = 100 * (seen * read).sum(dim=-1).clamp_min(0)
        return scores.float().cpu(), [token_count(tokenizer, text) > tokenizer.context_length for text in prompts]

    def compute(self, arm: str) -> dict[str, Figure]:
        """Mean score and share of cut texts, with bootstrap intervals."""
        note = (
            f"{self.architecture}, picture resized to the network's size, short side, centre crop; "
            f"open_clip {version('open_clip_torch')}"
        )
        figures = {}
        for name, values in super().per_picture(arm).items():
            low, high = bootstrap_mean(list(values.values()))
            unit = "share" if name == "clip_text_cut" else ""
            figures[name] = Figure(float(np.mean(list(values.values()))), low, high, len(values), unit, note)
        return figures

    def per_picture(self, arm: str) -> dict[str, dict[int, float]]:
        """Scores by picture index."""
        return {name: values for name, values in super().per_picture(arm).items() if name == self.name}

    @cached_property
    def _loaded(self) -> tuple[Any, Any, Any]:
        import open_clip

        path = self._weights_file()
        if path is None:
            raise FileNotFoundError(self.available())
        model, _, preprocess = open_clip.create_model_and_transforms(
            self.architecture,
            pretrained=str(path),
            device=self.device,
            require_pretrained=True,
            weights_only=not is_torchscript(path),
        )
        return model.eval(), preprocess, open_clip.get_tokenizer(self.architecture)

    def _file_names(self) -> tuple[str, ...]:
        stem = self.architecture.removesuffix("-quickgelu")
        return tuple(dict.fromkeys((f"{self.architecture}.safetensors", f"{self.architecture}.pt", f"{stem}.pt")))

    def _weights_file(self) -> Path | None:
        if self.place is None:
            return None
        place = Path(self.place).expanduser()
        candidates = [place, *(place / name for name in self._file_names())]
        return next((path for path in candidates if path.is_file()), None)


def is_torchscript(path: Path) -> bool:
    """Whether a weight file is a TorchScript archive, as OpenAI's are."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("constants.pkl") for name in archive.namelist())


def token_count(tokenizer: Any, text: str) -> int:
    """Tokens of a text with its start and end token, before anything is cut."""
    if hasattr(tokenizer, "encode"):
        return len(tokenizer.encode(text)) + 2
    return len(tokenizer.tokenizer(text).input_ids)
