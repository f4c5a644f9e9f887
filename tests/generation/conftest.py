"""Small runs, undisturbed and as a test asks for them."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console
from small_runs import LARGE, METHOD, PICTURES, SAMPLING, SAMPLING_OF_LARGE

from scale_dit.generation import Files, Job, Picture, Sampling, generate
from scale_dit.picture_files import load_picture


@pytest.fixture
def make(small_settings, tmp_path):
    """Runs `generate` in a folder below `tmp_path`."""

    def run(folder: str, pictures=PICTURES[:1], sampling=SAMPLING, stage="all", pick=None, resume=False, **options):
        files = Files(
            **{
                name: options.pop(name)
                for name in ("format", "quality", "save_every", "keep_latents")
                if name in options
            }
        )
        job = Job(stage, pick, options.pop("shard", None), resume)
        return generate(
            pictures, small_settings, METHOD, sampling, tmp_path / folder, job=job, files=files,
            **{"console": Console(quiet=True), **options},
        )  # fmt: skip

    return run


@pytest.fixture(scope="session")
def whole(small_settings, tmp_path_factory):
    """The pictures of an undisturbed run, by number."""
    folder = tmp_path_factory.mktemp("whole")
    files = generate(PICTURES, small_settings, METHOD, SAMPLING, folder, console=Console(quiet=True))
    return [load_picture(file) for file in files]


@pytest.fixture(scope="module")
def make_large(small_settings, tmp_path_factory):
    """Runs `generate` for one picture of several windows, with latents kept, and returns its file."""
    parent = tmp_path_factory.mktemp("large")

    def run(folder: str, picture: Picture = LARGE, sampling: Sampling = SAMPLING_OF_LARGE, **options) -> Path:
        options = {"files": Files(keep_latents=True), "console": Console(quiet=True), **options}
        (file,) = generate([picture], small_settings, METHOD, sampling, parent / folder, **options)
        return file

    return run


@pytest.fixture(scope="module")
def finished(make_large) -> Path:
    """A picture, its latents beside it."""
    return make_large("finished")
