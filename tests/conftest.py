"""A small random pipeline folder, made once a session."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_bases import CAPTIONS, GEOMETRY, SETTINGS, randomise

from scale_dit.embedded.build import build_text, build_transformer, build_vae, save_pipeline
from scale_dit.models.settings import BaseSettings


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests for a GPU are skipped, visibly, where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random base of 128 px in float32, with its settings, as `from_pretrained` reads it."""
    folder = tmp_path_factory.mktemp("bases") / "small"
    torch.manual_seed(0)
    text = build_text(CAPTIONS, GEOMETRY)
    components = {"transformer": build_transformer(GEOMETRY), "vae": build_vae(GEOMETRY), **text}
    randomise(components["transformer"], seed=1)
    save_pipeline(components, folder, torch.float32)
    SETTINGS.save(folder)
    return folder


@pytest.fixture(scope="session")
def small_settings(small_folder: Path) -> BaseSettings:
    """The settings that lie in the folder of the small base."""
    return BaseSettings.of(str(small_folder))
