"""Real photographs: the ones that scikit-image and scikit-learn ship."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture(scope="session")
def astronaut() -> Image.Image:
    data = pytest.importorskip("skimage.data")
    return Image.fromarray(data.astronaut()).crop((100, 0, 292, 160))


@pytest.fixture(scope="session")
def china() -> Image.Image:
    images = pytest.importorskip("sklearn.datasets")
    return Image.fromarray(images.load_sample_image("china.jpg"))


@pytest.fixture(scope="session")
def flower() -> Image.Image:
    images = pytest.importorskip("sklearn.datasets")
    return Image.fromarray(images.load_sample_image("flower.jpg"))


@pytest.fixture
def photo_folder(tmp_path: Path, astronaut: Image.Image, china: Image.Image, flower: Image.Image) -> Path:
    root = tmp_path / "photos"
    (root / "more").mkdir(parents=True)
    astronaut.save(root / "astronaut.png")
    china.save(root / "china.jpg", quality=90)
    flower.rotate(90, expand=True).save(root / "more" / "flower.webp")
    lines = [
        {"file_name": "astronaut.png", "text": "an astronaut  in an orange suit"},
        {"file_name": "more/flower.webp", "text": "a flower"},
    ]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (root / "china.txt").write_text("a Chinese temple\n", encoding="utf-8-sig")
    return root
