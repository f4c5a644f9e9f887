"""The trained base and LoRA that lie in the repository."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from small_bases import CAPTIONS

from scale_dit.lora import read_lora
from scale_dit.models.settings import BaseSettings
from scale_dit.pipeline import ScaleDiTPipeline

ASSETS = Path(__file__).parents[1] / "assets"


@pytest.fixture(scope="module")
def trained() -> Path:
    return ASSETS / "tiny-flux"


def test_trained_base_is_small_and_complete(trained: Path):
    files = [path for path in trained.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 32 * 2**20
    assert BaseSettings.of(str(trained)).name == "tiny"
    assert (trained / "README.md").is_file()
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".ckpt")]


def test_trained_base_in_stock_diffusers_is_our_draft(trained: Path):
    stock = FluxPipeline.from_pretrained(trained)
    pipeline = ScaleDiTPipeline.from_pretrained(trained)
    wanted = stock(
        CAPTIONS[0], height=256, width=256, num_inference_steps=4, true_cfg_scale=3.0, negative_prompt="",
        max_sequence_length=64, generator=torch.Generator().manual_seed(0), output_type="latent",
    ).images  # fmt: skip
    wanted = FluxPipeline._unpack_latents(wanted, 256, 256, 8)
    drafts, _ = pipeline.make_drafts([CAPTIONS[0]], 1024, 1024, 4.0, 4, 3.0, [torch.Generator().manual_seed(0)])
    torch.testing.assert_close(drafts, wanted, rtol=0, atol=1e-3)


def test_trained_lora_loads_in_stock_diffusers_and_here(trained: Path):
    folder = ASSETS / "tiny-lora"
    tensors, record = read_lora(folder)
    assert record["base"] == "tiny"
    assert any(value.abs().max() > 0 for key, value in tensors.items() if ".lora_B" in key)
    stock = FluxPipeline.from_pretrained(trained)
    stock.load_lora_weights(folder)
    parameters = dict(stock.transformer.named_parameters())
    loaded = [name for name in parameters if ".lora_" in name]
    assert len(loaded) == len(tensors)
    for key, value in tensors.items():
        module, letter = key.removesuffix(".weight").rsplit(".lora_", 1)
        (name,) = [each for each in loaded if each.startswith(f"{module}.lora_{letter}.")]
        assert torch.equal(parameters[name], value.to(parameters[name].dtype))
    ScaleDiTPipeline.from_pretrained(trained).load_lora_weights(folder)
