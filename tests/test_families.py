"""Every family from the folder on: stock pipelines, training, generation, LoRA files, on tiny random bases."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from training_runs import ROOT, SHORT

from scale_dit.entry import train
from scale_dit.lora import read_lora
from scale_dit.models.random_weights import TINY, base_settings, write_base
from scale_dit.models.settings import BaseSettings
from scale_dit.models.shapes import SHAPES, shape_of
from scale_dit.pipeline import ScaleDiTPipeline

EXPERIMENTS = {"scale_dit_4k": "flux1_dev", "scale_dit_8k": "flux1_dev", "klein_4k": "klein_base_9b",
               "klein_8k": "klein_base_9b"}  # fmt: skip
GEOMETRY = [f"base.{name}={value}" for name, value in TINY.items()]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny random base of each kind."""
    root = tmp_path_factory.mktemp("families")
    for name in ("flux1_dev", "klein_4b", "klein_base_9b"):
        write_base(name, root / name, dtype=torch.float32)
    return {folder.name: folder for folder in root.iterdir()}


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def config_of(entry: str, experiment: str, *more: str):
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose(entry, overrides=[f"experiment={experiment}", *more])


@pytest.mark.parametrize(("experiment", "base"), EXPERIMENTS.items())
@pytest.mark.parametrize("entry", ["train", "generate"])
def test_every_experiment_composes(entry, experiment, base):
    config = config_of(entry, experiment)
    assert instantiate(config.base).name == base
    assert config.scale == (8 if experiment.endswith("8k") else 4)


@pytest.mark.parametrize("name", SHAPES["full"])
def test_configs_and_python_agree_about_a_base(name):
    """What `BaseSettings` knows of a hub id without the configs is what the configs say."""
    settings = base_settings(name)
    config = config_of("train", "scale_dit_4k", f"base={name}")
    assert instantiate(config.base).family == settings.family
    shape = shape_of(name, "full")
    distilled = BaseSettings.of_kind(shape["transformer"].kind, name, settings.distilled)
    assert distilled.family == settings.family
    if "klein" in name:
        assert (distilled.shift, distilled.steps, distilled.guidance_scale, distilled.distilled) == (
            settings.shift, settings.steps, settings.guidance_scale, settings.distilled
        )  # fmt: skip


@pytest.mark.parametrize("name", ["klein_4b", "klein_base_9b"])
@torch.no_grad()
def test_klein_is_the_stock_pipeline_from_the_same_seed(folders, name):
    stock = DiffusionPipeline.from_pretrained(folders[name])
    pipeline = ScaleDiTPipeline.from_pretrained(folders[name])
    scale = 1.0 if name == "klein_4b" else 3.0
    wanted = stock(
        prompt=["a red circle", "sand"], height=128, width=96, generator=seeded(1, 2), num_inference_steps=3,
        guidance_scale=scale, max_sequence_length=48, output_type="latent",
    ).images  # fmt: skip
    drafts, _ = pipeline.make_drafts(["a red circle", "sand"], 512, 384, 4.0, 3, scale, seeded(1, 2))
    torch.testing.assert_close(pipeline.base.denormalise(drafts), wanted, rtol=0, atol=1e-4)
    pictures = stock.vae.decode(wanted, return_dict=False)[0] / 2 + 0.5
    torch.testing.assert_close(pipeline.base.decode_latents(drafts), pictures.clamp(0, 1), rtol=0, atol=1e-4)
    images = torch.rand(2, 3, 64, 96)
    latents = stock._encode_vae_image(images * 2 - 1, None)
    encoded = stock._unpatchify_latents(latents)
    torch.testing.assert_close(pipeline.base.encode_images(images), encoded, rtol=0, atol=1e-5)
    torch.testing.assert_close(pipeline.base.normalise(pipeline.base.denormalise(drafts)), drafts, rtol=0, atol=1e-5)


def test_a_family_is_known_by_its_weights(folders, tmp_path):
    """Without the settings beside them."""
    folder = tmp_path / "FLUX.2-klein-4B"
    folder.symlink_to(folders["klein_4b"])
    (bare := tmp_path / "bare" / "FLUX.2-klein-4B").mkdir(parents=True)
    for part in folder.iterdir():
        if part.name != "scale_dit.json":
            (bare / part.name).symlink_to(part)
    settings = ScaleDiTPipeline.from_pretrained(bare).settings
    assert (settings.name, settings.family, settings.steps) == ("klein_4b", "scale_dit.models.flux2.Flux2Klein", 4)


def test_what_a_long_prompt_loses_is_said(folders, caplog):
    base = ScaleDiTPipeline.from_pretrained(folders["klein_4b"]).base
    base.encode_prompts(["a large red circle"])
    assert not caplog.records
    base.encode_prompts(["a large red circle " * 20 + "zebra"])
    assert "it does not see:" in caplog.text
    assert caplog.text.rstrip().endswith("circle zebra")


@pytest.mark.parametrize("name", ["flux1_dev", "klein_base_9b"])
def test_a_tiny_base_trains_and_its_lora_acts_in_generation(folders, tmp_path, name):
    experiment = "scale_dit_4k" if name == "flux1_dev" else "klein_4k"
    config = config_of(
        "train", experiment, f"base={name}", f"base.path={folders[name]}", *GEOMETRY, *SHORT,
        f"paths.output_dir={tmp_path}", "trainer.max_steps=2",
    )  # fmt: skip
    train(config)
    (lora,) = tmp_path.rglob("pytorch_lora_weights.safetensors")
    tensors, record = read_lora(lora)
    assert record["base"] == name
    pipeline = ScaleDiTPipeline.from_pretrained(folders[name])
    options = {"height": 256, "width": 256, "scale": 2, "num_inference_steps": 1, "draft_steps": 1}
    without = pipeline("a red circle", **options, generator=seeded(1), output_type="latent").images
    pipeline.load_lora_weights(lora)
    with_lora = pipeline("a red circle", **options, generator=seeded(1), output_type="latent").images
    assert not torch.equal(without, with_lora)
    assert sum(hasattr(layer, "lora_A") for layer in pipeline.transformer.modules()) * 2 == len(tensors)
