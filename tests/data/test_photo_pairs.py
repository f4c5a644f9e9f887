"""Training on real photographs through the latent cache, with a real trainer on the small base."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from commands import run as run_command
from hydra import compose, initialize_config_dir
from training_runs import ROOT, SMALL_BASE

from scale_dit.data.buckets import BucketBatchSampler
from scale_dit.data.cached_pairs import EndlessBatches
from scale_dit.data.crops import Crops
from scale_dit.data.encoding import encode_batch
from scale_dit.data.photo_pairs import PhotoPairs
from scale_dit.data.photos import PhotoDataset, open_photos
from scale_dit.errors import UserError
from scale_dit.lightning import ScaleDiTModule
from scale_dit.lora import LoraSettings
from scale_dit.method import Method
from scale_dit.models.settings import BaseSettings
from scale_dit.run_folder import LAST
from scale_dit.training import build

CROPS = Crops(128, zoom_high=2.0, aspect_buckets=True)


class Batches(lightning.Callback):
    """Each batch that was trained on, and its loss; saves a checkpoint at a step and stops there if it is told to."""

    def __init__(self, stop: int | None, checkpoint: Path | None) -> None:
        self.stop, self.checkpoint = stop, checkpoint
        self.seen: list[dict[str, Any]] = []
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: dict[str, Any], index: int) -> None:
        self.seen.append(batch)
        self.losses.append(float(outputs["loss"]))
        if trainer.global_step == self.stop:
            trainer.save_checkpoint(self.checkpoint)
            trainer.should_stop = True

    @property
    def cuts(self) -> list[tuple[str, float]]:
        """Name and a number that tells the cut, of each picture in order."""
        return [
            (name, float(latents.sum()))
            for batch in self.seen
            for name, latents in zip(batch["name"], batch["latents"], strict=True)
        ]


@pytest.fixture
def module(small_settings: BaseSettings) -> ScaleDiTModule:
    torch.manual_seed(3)
    return ScaleDiTModule(small_settings, Method(scale=2), LoraSettings(4, 4), learning_rate=3e-3, warmup=1)


def pairs(photos: Path, **options: Any) -> PhotoPairs:
    folder = photos.parent
    common = {"cache": folder / "cache", "crops": CROPS, "batch_size": 1, "probe_store": folder / "probes"}
    return PhotoPairs(photos, **common | options)


def fit(
    module: ScaleDiTModule,
    data: PhotoPairs,
    steps: int,
    checkpoint: Path | None = None,
    stop: int | None = None,
    saved: Path | None = None,
) -> Batches:
    batches = Batches(stop, saved)
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[batches],
    )
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    return batches


def test_trains_on_photographs(module: ScaleDiTModule, photo_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (photo_folder / "torn.jpg").write_bytes((photo_folder / "china.jpg").read_bytes()[:99])
    caplog.set_level(logging.INFO)
    batches = fit(module, pairs(photo_folder, batch_size=2, default_caption="a photograph"), steps=3)
    assert len(set(batches.losses)) == 3
    assert torch.isfinite(torch.tensor(batches.losses)).all()
    assert any(parameter.any() for name, parameter in module.transformer.named_parameters() if "lora_B" in name)
    assert "Encoding photographs: 3 of 3" in caplog.text
    assert caplog.records[-1].getMessage().startswith("1 of 4 pictures skipped\n  torn.jpg: ")

    source = open_photos(photo_folder, default_caption="a photograph")
    dataset = PhotoDataset(source, CROPS, probe_store=photo_folder.parent / "probes")
    cuts = {item["name"]: item for item in (dataset[index] for index in range(len(dataset)))}
    assert {name for name, _ in batches.cuts} == {"astronaut.png", "china.jpg", "more/flower.webp"}
    base = module.base
    for batch in batches.seen:
        items = [cuts[name] for name in batch["name"]]
        images, captions = torch.stack([item["image"] for item in items]), [item["caption"] for item in items]
        expected = encode_batch(images, captions, base.encode_images, base.encode_prompts, module.method.scale)
        assert batch["caption"] == captions
        # The cache keeps bfloat16, which has 8 significant bits.
        for name in ("latents", "guidance_latents"):
            torch.testing.assert_close(batch[name], expected[name], rtol=2**-8, atol=1e-6)
        for name in ("tokens", "pooled"):
            torch.testing.assert_close(batch["text"][name].float(), expected["text"][name], rtol=2**-8, atol=1e-6)


def test_resumed_order_equals_uninterrupted(module: ScaleDiTModule, photo_folder: Path, tmp_path: Path) -> None:
    """Six cuts are an epoch: the run is interrupted in the middle of the first and ends in the second."""
    start = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    whole = fit(module, pairs(photo_folder, draws=2, seed=5), steps=9)
    assert sorted(whole.cuts[:6]) == sorted(set(whole.cuts[:6]))
    shard = next((tmp_path / "cache").rglob("shard-*"))
    written = shard.stat().st_mtime_ns

    module.load_state_dict(start)
    first = fit(module, pairs(photo_folder, draws=2, seed=5), steps=9, stop=4, saved=tmp_path / "four.ckpt")
    assert shard.stat().st_mtime_ns == written, "what is in the cache is not encoded again"
    module.load_state_dict(start)
    saved = tmp_path / "seven.ckpt"
    second = fit(module, pairs(photo_folder, draws=2, seed=5), 9, tmp_path / "four.ckpt", stop=7, saved=saved)
    third = fit(module, pairs(photo_folder, draws=2, seed=5), 9, saved)
    assert [len(part.cuts) for part in (first, second, third)] == [4, 3, 2]
    assert first.cuts + second.cuts + third.cuts == whole.cuts
    assert first.losses + second.losses + third.losses == whole.losses

    other = fit(module, pairs(photo_folder, draws=2, seed=6), steps=9)
    assert len(list((tmp_path / "cache").iterdir())) == 1, "another order needs no other cuts"
    assert sorted(other.cuts[:6]) == sorted(whole.cuts[:6])
    assert other.cuts != whole.cuts


def test_other_photographs_begin_anew(
    module: ScaleDiTModule, photo_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit(module, pairs(photo_folder), steps=4, stop=2, saved=tmp_path / "last.ckpt")
    (photo_folder / "more" / "flower.webp").unlink()
    (photo_folder / "metadata.jsonl").unlink()
    data = pairs(photo_folder, default_caption="")
    batches = fit(module, data, 4, tmp_path / "last.ckpt")
    assert "their order begins anew" in caplog.text
    assert {name for name, _ in batches.cuts} == {"astronaut.png", "china.jpg"}
    assert data.state_dict()["batches"] == 2
    fresh = fit(module, pairs(photo_folder, default_caption=""), steps=2)
    assert batches.cuts == fresh.cuts


class Sized:
    """Twelve items of two sizes."""

    bucket_of = [0] * 7 + [1] * 5


def test_ranks_share_each_epoch_and_resume_anywhere() -> None:
    def batches(rank: int, first: int, count: int) -> list[list[int]]:
        order = BucketBatchSampler(Sized(), 2, seed=1, drop_last=False, rank=rank, ranks=3)  # type: ignore[arg-type]
        return [batch for batch, _ in zip(EndlessBatches(order, first), range(count), strict=False)]

    epochs = [[batches(rank, 2 * epoch, 2) for rank in range(3)] for epoch in range(2)]
    for epoch in epochs:
        together = [batch for rank in epoch for batch in rank]
        used = [item for batch in together for item in batch]
        assert len(used) == len(set(used))
        assert all(len({Sized.bucket_of[item] for item in batch}) == 1 for batch in together)
    assert epochs[0] != epochs[1]
    for first in range(6):
        assert batches(1, first, 5) == batches(1, 0, first + 5)[first:]


def test_what_cannot_be_is_said_before_weights_are_loaded(photo_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.path=<folder>"):
        PhotoPairs(None, tmp_path / "cache")
    with pytest.raises(UserError, match=r"no photographs at .*elsewhere.*check data\.path"):
        PhotoPairs(tmp_path / "elsewhere", tmp_path / "cache")
    for option in ("batch_size", "draws"):
        with pytest.raises(UserError, match=rf"{option} is 0, but it must be at least 1 \(data\.{option}\)"):
            pairs(photo_folder, **{option: 0})
    (photo_folder / "china.txt").unlink()
    with pytest.raises(UserError, match=r"1 of 3 pictures .* no caption \(china\.jpg\).*default_caption"):
        pairs(photo_folder)
    assert pairs(photo_folder, default_caption="").source.captions.count("") == 1


def test_cuts_that_the_base_cannot_read_are_refused_before_encoding(module: ScaleDiTModule, photo_folder: Path) -> None:
    with pytest.raises(UserError, match="72 px is not a positive multiple of this base's token size, 16 px"):
        fit(module, pairs(photo_folder, crops=Crops(72, token=8)), steps=1)
    assert not (photo_folder.parent / "cache").exists()


def options(base: Path, photos: Path, *more: str) -> list[str]:
    return [
        "experiment=scale_dit_4k",
        "base=tiny",
        f"base.path={base}",
        *SMALL_BASE,
        "data=photos",
        f"data.path={photos}",
        "callbacks=none",
        "trainer.accelerator=cpu",
        "trainer.precision=32-true",
        *more,
    ]


@pytest.mark.slow
def test_two_processes_build_one_cache_and_stop_together(
    small_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    answer = run_command(
        "train.py", *options(small_folder, photo_folder, "callbacks=default", "logger=csv"),
        f"paths.root_dir={tmp_path}", f"hydra.run.dir={run}", "trainer.max_steps=100", "trainer.devices=2",
        "+trainer.strategy=ddp", "data.batch_size=1", "callbacks.samples=null", "callbacks.progress=null",
        "callbacks.checkpoint.every_n_steps=2", "trainer.enable_progress_bar=false",
        "+callbacks.signal={_target_:training_runs.SignalAt,step:4}",
    )  # fmt: skip
    assert answer.returncode == 130, answer.stderr
    assert answer.stderr.count("Interrupted after step") == 1, answer.stderr
    state = torch.load(run / LAST)
    assert state["PhotoPairs"]["batches"] == state["global_step"] < 100
    assert len(list((tmp_path / "data" / "latents").iterdir())) == 1


def test_config(small_folder: Path, photo_folder: Path, tmp_path: Path) -> None:
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        paths = (f"paths.root_dir={tmp_path}", f"paths.output_dir={tmp_path / 'run'}")
        config = compose("train", options(small_folder, photo_folder, *paths, "logger=csv", "data.seed=9"))
    data = build(config)["data"]
    assert isinstance(data, PhotoPairs)
    assert (data.path, data.cache, data.seed) == (photo_folder, tmp_path / "data" / "latents", 9)
    assert data.crops == Crops(128, zoom_high=2.0, aspect_buckets=True)
