"""A pipeline with LoRAs, other ways to decode, in other precisions and places."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from pipelines import PROMPTS, latents_of, seeded
from small_bases import add_random_lora, drive, flux

from scale_dit.autoencoder import Decoding
from scale_dit.errors import UserError
from scale_dit.lora import LoraSettings, save_lora
from scale_dit.method import Method
from scale_dit.pipeline import ScaleDiTPipeline


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A LoRA file of each scope, and one of another base."""
    folders = {name: tmp_path_factory.mktemp("loras") / name for name in ("guidance", "all", "foreign")}
    for name, folder in folders.items():
        base, scope = drive(flux("small")), "all" if name == "all" else "guidance"
        add_random_lora(base, scope=scope)
        record = {"base": "flux1_dev" if name == "foreign" else "small"} | Method(scale=2).summary
        save_lora(base.transformer, folder, LoraSettings(4, 4, scope), record)
    return folders


def test_lora_is_loaded_replaced_and_removed(pipeline, loras, caplog):
    plain = latents_of(pipeline)
    names = set(pipeline.transformer.state_dict())
    with caplog.at_level(logging.WARNING):
        pipeline.load_lora_weights(loras["guidance"])
        guided = latents_of(pipeline)
        assert "trained with scale" not in caplog.text  # 256 px are twice this base's native side
        latents_of(pipeline, height=512, width=512, num_inference_steps=1)
    assert "trained with scale=2, now it is 4.0" in caplog.text
    assert not torch.allclose(plain, guided, atol=1e-3)
    pipeline.load_lora_weights(loras["all"])
    assert pipeline.base.image_adapters
    assert not torch.allclose(guided, latents_of(pipeline), atol=1e-3)
    pipeline.load_lora_weights(loras["guidance"])
    assert torch.equal(guided, latents_of(pipeline))
    for _ in range(2):
        pipeline.unload_lora_weights()
        assert set(pipeline.transformer.state_dict()) == names
        assert torch.equal(plain, latents_of(pipeline))


def test_another_backend_keeps_the_lora(pipeline, loras):
    pipeline.load_lora_weights(loras["guidance"])
    guided = latents_of(pipeline)
    pipeline.configure(pipeline.settings, "reference")
    assert pipeline.base.backend == "reference"
    torch.testing.assert_close(latents_of(pipeline), guided, rtol=0, atol=1e-4)


def test_lora_acts_neither_on_drafts_nor_without_guidance(pipeline, loras):
    plain = pipeline(PROMPTS[0], 256, 256, generator=seeded(0)[0], output_type="latent").draft_latents
    pipeline.load_lora_weights(loras["guidance"])
    adapted = pipeline(PROMPTS[0], 256, 256, generator=seeded(0)[0], output_type="latent").draft_latents
    assert torch.equal(plain, adapted)


def test_lora_of_another_base_leaves_the_loaded_one(pipeline, loras, tmp_path: Path):
    pipeline.load_lora_weights(loras["guidance"])
    guided = latents_of(pipeline)
    with pytest.raises(UserError, match="trained on base 'flux1_dev', but the base is 'small'"):
        pipeline.load_lora_weights(loras["foreign"])
    with pytest.raises(UserError, match="does not exist"):
        pipeline.load_lora_weights(tmp_path / "nothing")
    assert torch.equal(guided, latents_of(pipeline))


def test_decoding_in_tiles_is_near(pipeline):
    latents = latents_of(pipeline)
    whole = pipeline.decode(latents)
    pipeline.decoding = Decoding("tiled", tile=192, overlap=64)
    tiled = pipeline.decode(latents)
    assert not torch.equal(whole, tiled)
    assert (whole - tiled).abs().mean() < 0.05


def test_bfloat16_runs_through(small_folder: Path):
    pipeline = ScaleDiTPipeline.from_pretrained(small_folder, torch_dtype=torch.bfloat16)
    output = pipeline(PROMPTS[0], 256, 256, generator=seeded(0)[0], output_type="pt", low_pass=0.2, start=0.8)
    assert output.images.dtype == torch.float32
    assert output.images.isfinite().all()


class Counter(ModelHook):
    """What `enable_model_cpu_offload` attaches, without a GPU: it must hear of every pass."""

    calls = 0

    def pre_forward(self, module, *arguments, **options):
        self.calls += 1
        return arguments, options


def test_offload_hooks_of_the_transformer_are_heard(small_folder: Path):
    pipeline = ScaleDiTPipeline.from_pretrained(small_folder)
    counter = Counter()
    add_hook_to_module(pipeline.transformer, counter)
    latents_of(pipeline, num_inference_steps=2, draft_steps=1)
    assert counter.calls == 2 * 1 + 1 + 2 * 2


@pytest.mark.gpu
def test_model_cpu_offload(small_folder: Path):
    pipeline = ScaleDiTPipeline.from_pretrained(small_folder)
    wanted = latents_of(pipeline)
    pipeline.enable_model_cpu_offload()
    for _ in range(2):
        torch.testing.assert_close(latents_of(pipeline).cpu(), wanted, rtol=0, atol=1e-2)
    assert pipeline.transformer.device.type == "cpu"


def test_folder_without_weights_is_told(tmp_path: Path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="base=tiny"):
        ScaleDiTPipeline.from_pretrained(tmp_path / "nothing")
