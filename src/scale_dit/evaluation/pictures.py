"""Pictures as 8-bit files that carry their own provenance, so that an interrupted evaluation goes on."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from scale_dit.files import write_atomically

PROVENANCE = "scale_dit"


def to_uint8(images: Tensor) -> Tensor:
    """Float pictures in [0, 1] as uint8, clamped and rounded; uint8 passes unchanged.

    Truncation would wrap 1.004 round to 0, which metric libraries do when left to convert by themselves.

    Raises:
        ValueError: a value is not finite.
    """
    if images.dtype == torch.uint8:
        return images
    if not torch.isfinite(images).all():
        raise ValueError("the pictures hold NaN or infinity: look at the model that made them before measuring")
    return (images.float().clamp(0, 1) * 255).round().to(torch.uint8)


def to_float(images: Tensor) -> Tensor:
    """uint8 pictures as float32 in [0, 1]; float passes as float32, clamped."""
    if images.dtype == torch.uint8:
        return images.float() / 255
    return images.float().clamp(0, 1)


def fingerprint(settings: Mapping[str, Any], prompt: str, seed: int) -> str:
    """Digest of everything that decides what a picture looks like; settings must be plain values."""
    text = json.dumps([dict(settings), prompt, seed], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def save_picture(image: Tensor, path: Path, provenance: Mapping[str, Any] | None = None) -> None:
    """Write one picture `[3, H, W]` as PNG, atomically, with `provenance` as JSON in a text chunk."""
    pixels = to_uint8(image).permute(1, 2, 0).cpu().numpy()
    information = PngImagePlugin.PngInfo()
    if provenance is not None:
        information.add_itxt(PROVENANCE, json.dumps(dict(provenance), default=str))
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, format="PNG", pnginfo=information, compress_level=1)
    write_atomically(path, content.getbuffer())


def load_picture(path: Path) -> Tensor:
    """One picture from disk as uint8 `[3, H, W]`."""
    with Image.open(path) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).contiguous()


def read_provenance(path: Path) -> dict[str, Any] | None:
    """The provenance that `save_picture` wrote; None if the file is missing, unreadable or somebody else's."""
    try:
        with Image.open(path) as picture:
            picture.load()
            text = getattr(picture, "text", {}).get(PROVENANCE)
    except OSError:
        return None
    return json.loads(text) if text else None
