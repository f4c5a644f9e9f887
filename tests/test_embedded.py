"""The embedded base: its parts, its training modules with a real trainer, and, where it is there, the trained one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import lightning
import pytest
import torch
from diffusers import AutoencoderKL, FluxPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from small_bases import CAPTIONS, GEOMETRY, SETTINGS, noise

from scale_dit.data.captions import caption
from scale_dit.data.render import render
from scale_dit.data.scene_batches import SceneLatents
from scale_dit.data.scene_sampling import sample_scene
from scale_dit.embedded.base import TinyBaseModule, pack, sample_captions
from scale_dit.embedded.build import (
    TinyGeometry,
    build_text,
    build_transformer,
    build_vae,
    initialise_transformer,
    save_pipeline,
    train_clip_tokenizer,
    train_t5_tokenizer,
)
from scale_dit.embedded.vae import TinyVAEModule, export_vae, peak_signal_to_noise, spectrum_loss
from scale_dit.errors import UserError
from scale_dit.models.settings import BaseSettings
from scale_dit.pipeline import ScaleDiTPipeline

ASSETS = Path(__file__).parents[1] / "assets"


@pytest.fixture(scope="module")
def captions() -> list[str]:
    return sample_captions(300)


def test_every_caption_fits_and_comes_back_from_the_t5_tokenizer(captions):
    geometry = TinyGeometry()
    tokenizer = train_t5_tokenizer(captions, geometry)
    for text in captions:
        ids = tokenizer(text).input_ids
        assert len(ids) <= geometry.text_tokens, text
        assert tokenizer.unk_token_id not in ids, text
        assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ,", ",").replace(" .", ".") == text


def test_captions_are_short_in_the_clip_tokenizer(captions):
    tokenizer = train_clip_tokenizer(captions, TinyGeometry())
    longest = max(len(tokenizer(text).input_ids) for text in captions)
    assert longest <= 77
    words = tokenizer.decode(tokenizer(captions[0]).input_ids, skip_special_tokens=True)
    assert words.replace(" ", "") == captions[0].lower().replace(" ", "")


@pytest.fixture(scope="module")
def tokenizers():
    return train_clip_tokenizer(CAPTIONS, GEOMETRY), train_t5_tokenizer(CAPTIONS, GEOMETRY)


@given(text=st.text(max_size=60))
@settings(deadline=None, max_examples=60)
def test_any_text_can_be_encoded(tokenizers, text):
    clip, t5 = tokenizers
    ids = clip(text, padding="max_length", max_length=77, truncation=True).input_ids
    assert len(ids) == 77
    assert max(ids) < len(clip)
    ids = t5(text, padding="max_length", truncation=True).input_ids
    assert len(ids) == GEOMETRY.text_tokens
    assert max(ids) < len(t5)


def test_the_embedded_base_is_a_quarter_of_flux_in_every_length_and_small():
    geometry, flux = TinyGeometry(), BaseSettings(name="flux1_dev")
    tiny = BaseSettings(name="tiny", cell=2, window=4, native=256, text_length=64)
    assert sum(geometry.rope_axes) == geometry.head_dim
    assert (flux.cell / tiny.cell, flux.window / tiny.window, flux.native / tiny.native) == (4, 4, 4)
    assert geometry.text_tokens == tiny.text_length
    torch.manual_seed(0)
    modules = [
        build_transformer(),
        build_vae(),
        *(m for m in build_text(CAPTIONS).values() if hasattr(m, "parameters")),
    ]
    assert sum(p.numel() for module in modules for p in module.parameters()) * 2 < 32 * 2**20


def test_fresh_transformer_predicts_nothing_yet():
    transformer = build_transformer(GEOMETRY)
    initialise_transformer(transformer)
    assert not transformer.proj_out.weight.any()
    assert not transformer.transformer_blocks[0].norm1.linear.weight.any()
    assert transformer.transformer_blocks[0].attn.to_q.weight.std() > 0


def test_saved_folder_loads_in_stock_diffusers_in_both_dtypes(tmp_path: Path):
    torch.manual_seed(0)
    components = {"transformer": build_transformer(GEOMETRY), "vae": build_vae(GEOMETRY)} | build_text(
        CAPTIONS, GEOMETRY
    )
    weight = components["transformer"].x_embedder.weight.detach().clone()
    save_pipeline(components, tmp_path)
    for dtype in (None, torch.bfloat16):
        pipeline = FluxPipeline.from_pretrained(tmp_path, **({"torch_dtype": dtype} if dtype else {}))
        dtypes = {module.dtype for module in pipeline.components.values() if isinstance(module, torch.nn.Module)}
        assert dtypes == {dtype or torch.float32}
        assert torch.equal(pipeline.transformer.x_embedder.weight.float(), weight.bfloat16().float())
        assert not pipeline.transformer.config.guidance_embeds
    assert pipeline("a circle", height=64, width=64, num_inference_steps=1, max_sequence_length=24).images[0].size == (
        64,
        64,
    )


def test_psnr_and_spectrum_loss_by_hand():
    picture = noise(2, 3, 32, 32).clamp(-1, 1)
    shifted = torch.zeros(1, 3, 32, 32)
    assert peak_signal_to_noise(shifted + 0.2, shifted).item() == pytest.approx(20, abs=1e-4)  # 0.1 of the range
    assert spectrum_loss(picture, picture) == 0
    blurred = torch.nn.functional.avg_pool2d(picture, 3, 1, 1)
    assert spectrum_loss(blurred, picture) > spectrum_loss(picture.roll(1, 3), picture)


class Repeat(torch.utils.data.Dataset):
    """One batch again and again."""

    def __init__(self, batch: dict, count: int):
        self.batch, self.count = batch, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        return self.batch


def fit(module: lightning.LightningModule, batch: dict, steps: int, validate: bool = False) -> list[float]:
    """Train on one batch and return every step's loss."""
    losses = []

    class Losses(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, *_):
            losses.append(float(outputs["loss"]))

    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=int(validate), callbacks=[Losses()],
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(Repeat(batch, steps), batch_size=None)
    trainer.fit(module, loader, loader if validate else None)
    return losses


def test_autoencoder_learns_and_exports_its_normalisation(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("scale_dit.embedded.vae.build_vae", lambda: build_vae(GEOMETRY))
    torch.manual_seed(0)
    module = TinyVAEModule(learning_rate=3e-3, export=str(tmp_path))
    picture = render([sample_scene(seed) for seed in range(2)], 64, 64)
    losses = fit(module, {"image": picture}, steps=30, validate=True)
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    vae = AutoencoderKL.from_pretrained(tmp_path, subfolder="vae")
    with torch.no_grad():
        latents = module.vae.encode(picture * 2 - 1).latent_dist.mean
    normalised = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    assert normalised.mean().item() == pytest.approx(0, abs=1e-3)
    assert normalised.square().mean().item() == pytest.approx(1, abs=1e-2)
    again = TinyVAEModule(initial=str(tmp_path))
    assert torch.equal(again.vae.decoder.conv_in.weight, vae.decoder.conv_in.weight)


@pytest.fixture(scope="module")
def base_training(tmp_path_factory: pytest.TempPathFactory):
    """A small base after a few steps on one batch: its losses and its folder."""
    folder = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scale_dit.embedded.vae.build_vae", lambda: build_vae(GEOMETRY))
        patch.setattr("scale_dit.embedded.base.build_text", lambda captions: build_text(captions, GEOMETRY))
        patch.setattr("scale_dit.embedded.base.build_transformer", lambda: build_transformer(GEOMETRY))
        torch.manual_seed(0)
        vae = build_vae(GEOMETRY)
        vae.register_to_config(shift_factor=0.25, scaling_factor=2.0)
        export_vae(vae, folder)
        module = TinyBaseModule(
            str(folder), SETTINGS, CAPTIONS, learning_rate=2e-2, largest_offset=16, offset_share=0.5, export=str(folder)
        )
        clip_ids, t5_ids = module.tokenize(CAPTIONS[:2])
        batch = {"latents": noise(2, 16, 16, 16) * 0.1, "clip_ids": clip_ids, "t5_ids": t5_ids}
        before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
        losses = fit(module, batch, steps=30)
    # more than the export's rounding to bfloat16
    moved = {
        name
        for name, parameter in module.named_parameters()
        if (parameter.float() - before[name]).norm() > 0.05 * before[name].norm()
    }
    return losses, folder, module, moved


def test_base_learns_transformer_and_text_encoders_together(base_training):
    losses, _, _, moved = base_training
    # the first velocity is zero, so the first loss is the second moment of eps - x_0
    assert losses[0] == pytest.approx(1.01, abs=0.05)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert {name.split(".")[0] for name in moved} == {"transformer", "text_encoder", "text_encoder_2"}


def test_exported_base_runs_in_stock_diffusers_and_in_the_pipeline(base_training):
    _, folder, module, _ = base_training
    stock = FluxPipeline.from_pretrained(folder)
    assert stock.vae.config.scaling_factor == 2.0
    assert stock.scheduler.config.shift == SETTINGS.shift
    assert BaseSettings.of(str(folder)) == replace(SETTINGS, path=str(folder))
    ids = module.tokenize(["a large red circle on sand"])
    prompt = stock.encode_prompt("a large red circle on sand", max_sequence_length=24)
    with torch.no_grad():
        stored = module.text_encoder_2.bfloat16().float()(ids[1])[0]
    torch.testing.assert_close(prompt[0], stored, rtol=0, atol=1e-5)
    images = ScaleDiTPipeline.from_pretrained(folder)("a circle", 256, 256, num_inference_steps=1, draft_steps=1).images
    assert images[0].size == (256, 256)


def test_training_goes_on_from_a_base(base_training, tmp_path: Path):
    _, folder, module, _ = base_training
    again = TinyBaseModule(str(folder), SETTINGS, initial=str(folder))
    weights, stored = again.state_dict(), FluxPipeline.from_pretrained(folder).transformer.state_dict()
    assert all(torch.equal(weights[f"transformer.{name}"], value) for name, value in stored.items())
    assert all(torch.equal(a, b) for a, b in zip(again.tokenize(CAPTIONS), module.tokenize(CAPTIONS), strict=True))
    trained = {name.split(".")[0] for name, parameter in again.named_parameters() if parameter.requires_grad}
    assert trained == {"transformer", "text_encoder", "text_encoder_2"}
    with pytest.raises(UserError, match="would be overwritten"):
        TinyBaseModule(str(folder), SETTINGS, initial=str(folder), export=f"{folder}/../{folder.name}")
    with pytest.raises(UserError, match=r"leave model\.initial"):
        TinyBaseModule(str(folder), SETTINGS, initial=str(tmp_path))


def test_base_trains_on_scenes_of_several_sizes(base_training):
    _, folder, module, _ = base_training
    data = SceneLatents(count=10, batch_size=3, sizes=[(64, 64, 0.6), (32, 64, 0.4)], workers=0)
    again = TinyBaseModule(str(folder), SETTINGS, initial=str(folder))
    trainer = lightning.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(again, datamodule=data)
    assert trainer.global_step == 2
    assert [tuple(bucket["latents"].shape) for bucket in data.buckets] == [(6, 16, 8, 8), (4, 16, 4, 8)]
    # the second bucket's scenes have their own seeds and shape, and their tokens lie beside them
    scenes = [sample_scene(10_000_000 + index, aspect=2.0) for index in range(4)]
    with torch.no_grad():
        mean = again.vae.encode(render(scenes, 32, 64) * 2 - 1).latent_dist.mean
    latents = (mean - again.vae.config.shift_factor) * again.vae.config.scaling_factor
    torch.testing.assert_close(data.buckets[1]["latents"], latents.bfloat16(), rtol=0.02, atol=0.02)
    clip_ids, t5_ids = module.tokenize([caption(scene, scene.seed) for scene in scenes])
    assert torch.equal(data.buckets[1]["clip_ids"].long(), clip_ids)
    assert torch.equal(data.buckets[1]["t5_ids"].long(), t5_ids)


def test_positions_are_the_pipelines_own_or_shifted_as_a_whole(base_training):
    module = base_training[2]
    plain = FluxPipeline._prepare_latent_image_ids(1, 6, 5, "cpu", torch.float32)
    torch.manual_seed(0)
    offsets = [module._positions(6, 5) - plain for _ in range(40)]
    assert all((each == each[0]).all() for each in offsets)
    kinds = {tuple(each[0].tolist()) for each in offsets}
    assert (0, 0, 0) in kinds
    assert len(kinds) > 10
    assert max(max(kind) for kind in kinds) <= 16
    assert {kind[0] for kind in kinds} == {0}
    with pytest.raises(UserError, match=r"largest_offset is 15.*at least 16.*model\.largest_offset=64"):
        TinyBaseModule("nowhere", SETTINGS, CAPTIONS, largest_offset=15)
    # by a whole grid at least, so that a position near the origin says where in the picture a token is
    assert all(min(kind[1:]) >= 6 for kind in kinds - {(0, 0, 0)})


def test_captions_are_dropped_whole(base_training):
    module = base_training[2]
    clip_ids, t5_ids = module.tokenize(["a circle"] * 400)
    torch.manual_seed(0)
    dropped_clip, dropped_t5 = module._drop_captions(clip_ids, t5_ids)
    gone = (dropped_clip != clip_ids).any(1)
    assert torch.equal(gone, (dropped_t5 != t5_ids).any(1))
    assert 0.05 < gone.float().mean() < 0.16
    assert torch.equal(dropped_t5[gone], module.empty[1].expand(int(gone.sum()), -1))


def test_packing_is_the_pipelines_own():
    latents = noise(1, 16, 4, 6)
    assert torch.equal(FluxPipeline._unpack_latents(pack(latents), 32, 48, 8), latents)


def test_base_without_an_autoencoder_says_which_command_makes_one(tmp_path: Path):
    with pytest.raises(UserError, match=r"python src/train.py experiment=tiny_vae"):
        TinyBaseModule(str(tmp_path), SETTINGS)
