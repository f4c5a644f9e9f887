"""The example of docs/data.md runs as it is printed."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs" / "data.md"


def test_example(photo_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (photo_folder.parent / "data" / "photos").mkdir(parents=True)
    photo_folder.rename(photo_folder.parent / "data" / "photos" / "train")
    monkeypatch.chdir(photo_folder.parent)
    monkeypatch.setenv("XDG_CACHE_HOME", str(photo_folder.parent / "cache"))
    base = SimpleNamespace(
        encode_images=lambda images: torch.nn.functional.avg_pool2d(images, 8),
        encode_prompts=lambda captions: {"tokens": torch.ones(len(captions), 4, 2)},
    )
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    names: dict[str, object] = {"base": base}
    exec(example, names)
    latents = names["latents"]
    assert len(latents) == 2 * 4  # the astronaut is smaller than a cut of 256 px
    assert latents[0]["guidance_latents"].shape[0] == 3
    assert "1 of 3 pictures skipped\n  astronaut.png: 160x192 px is smaller" in capsys.readouterr().out
