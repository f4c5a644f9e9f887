"""A small random pipeline folder, made once a session."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_bases import CAPTIONS, GEOMETRY, SETTINGS, randomise

from scale_dit.autoencoder import Decoding
from scale_dit.embedded.build import build_text, build_transformer, build_vae, save_pipeline
from scale_dit.method import Method
from scale_dit.models.settings import BaseSettings
from scale_dit.pipeline import ScaleDiTPipeline


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


@pytest.fixture(scope="session")
def shared_pipeline(small_folder: Path) -> ScaleDiTPipeline:
    pipeline = ScaleDiTPipeline.from_pretrained(small_folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipeline(shared_pipeline: ScaleDiTPipeline):
    """The pipeline as it was loaded, whatever earlier tests did to it."""
    yield shared_pipeline
    shared_pipeline.unload_lora_weights()
    shared_pipeline.method, shared_pipeline.decoding = Method(), Decoding()
    shared_pipeline.configure(shared_pipeline.settings)
