"""The latent cache with a real (tiny, random) autoencoder on real photographs."""

from __future__ import annotations

import dataclasses
import json
import pickle
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader

from scale_dit.data.buckets import BucketBatchSampler
from scale_dit.data.cache import CachedLatents, LatentCache, build_cache, cache_fingerprint, encode_batch
from scale_dit.data.cache_store import weights_fingerprint
from scale_dit.data.crops import Crops
from scale_dit.data.encoding import guidance_size, reduce_pictures
from scale_dit.data.photos import PhotoDataset, Skipped, open_photos
from scale_dit.errors import UserError


@dataclasses.dataclass
class Text:
    tokens: Tensor
    mask: Tensor


class Base:
    """The two encoders of a base, counting what goes through them."""

    def __init__(self) -> None:
        from diffusers import AutoencoderKL

        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.vae = AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                block_out_channels=(8, 8),
                norm_num_groups=4,
                latent_channels=4,
            ).eval()
            self.letters = torch.nn.Embedding(256, 8)
        self.images: list[int] = []
        self.captions: list[str] = []

    def encode_image(self, images: Tensor) -> Tensor:
        self.images.append(len(images))
        return self.vae.encode(images * 2 - 1).latent_dist.mean

    def encode_text(self, captions: list[str]) -> Text:
        self.captions += captions
        padded = torch.tensor([list(caption.encode()[:16].ljust(16, b"\0")) for caption in captions])
        return Text(self.letters(padded), padded != 0)


@pytest.fixture(scope="module")
def weights() -> Base:
    return Base()


@pytest.fixture
def base(weights: Base) -> Base:
    weights.images, weights.captions = [], []
    return weights


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    data = pytest.importorskip("skimage.data")
    root = tmp_path / "photos"
    root.mkdir()
    captions = {}
    pictures = {"astronaut": data.astronaut(), "chelsea": data.chelsea(), "coffee": data.coffee()}
    for name, pixels in pictures.items():
        for part, image in enumerate(Image.fromarray(pixels).resize((240, 160)).crop(box) for box in PARTS):
            image.save(root / f"{name}{part}.png")
            captions[f"{name}{part}.png"] = f"a picture of {name}"
    lines = [json.dumps({"file_name": name, "caption": caption}) for name, caption in captions.items()]
    (root / "metadata.jsonl").write_text("\n".join(lines))
    return root


PARTS = [(0, 0, 120, 120), (120, 0, 240, 80), (0, 80, 120, 160)]


def photos(folder: Path, **crops: Any) -> PhotoDataset:
    options = {"size": 64, "place": "centre", "aspect_buckets": True} | crops
    return PhotoDataset(open_photos(folder), Crops(**options), probe_store=folder.parent / "probes")


def build(dataset: PhotoDataset, base: Base, folder: Path, weights: str = "random", **options: Any) -> LatentCache:
    options = {"records_per_shard": 4, "batch_size": 2, "dtype": torch.float32} | options
    return build_cache(dataset, base.encode_image, base.encode_text, folder, weights, **options)


def test_cache_equals_encoding_each_picture(folder: Path, base: Base, tmp_path: Path) -> None:
    dataset = photos(folder)
    done: list[tuple[int, int]] = []
    build(dataset, base, tmp_path / "cache", progress=lambda *count: done.append(count))
    assert done == [(4, 9), (8, 9), (9, 9)]
    assert sorted(base.captions) == ["", "a picture of astronaut", "a picture of chelsea", "a picture of coffee"]
    cached = CachedLatents(tmp_path / "cache")
    assert len(cached) == len(dataset) == 9
    assert set(cached.sizes) == {(64, 64), (48, 80)}
    for index in range(9):
        item, photo = cached[index], dataset[index]
        expected = encode_batch(photo["image"][None], [photo["caption"]], base.encode_image, base.encode_text)
        assert item["name"] == photo["name"]
        assert item["caption"] == photo["caption"]
        # Batches of one and of two differ in the last bits of a convolution.
        torch.testing.assert_close(item["latents"], expected["latents"][0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(item["guidance_latents"], expected["guidance_latents"][0], atol=1e-5, rtol=1e-5)
        assert torch.equal(item["text"]["tokens"], expected["text"]["tokens"][0])
        assert torch.equal(item["text"]["mask"], expected["text"]["mask"][0])
        assert item["text"]["mask"].dtype == torch.bool
    assert not cached.text("")["mask"].any()


def test_batches_of_one_size_through_a_worker(folder: Path, base: Base, tmp_path: Path) -> None:
    build(photos(folder), base, tmp_path / "cache", dtype=torch.bfloat16, workers=1)
    cached = pickle.loads(pickle.dumps(CachedLatents(tmp_path / "cache")))
    sampler = BucketBatchSampler(cached, 2, drop_last=False)
    batches = list(DataLoader(cached, batch_sampler=sampler, num_workers=1))
    assert sorted(name for batch in batches for name in batch["name"]) == sorted(photos(folder).source.names)
    for batch in batches:
        assert batch["latents"].dtype == batch["guidance_latents"].dtype == torch.float32
        assert batch["text"]["tokens"].dtype == torch.bfloat16
        assert batch["text"]["tokens"].shape == (len(batch["name"]), 16, 8)
        assert batch["latents"].shape[1:] in [(4, 32, 32), (4, 24, 40)]


def test_an_interrupted_build_goes_on(folder: Path, base: Base, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 8:
            raise KeyboardInterrupt

    dataset = photos(folder)
    with pytest.raises(KeyboardInterrupt):
        build(dataset, base, tmp_path / "cache", progress=interrupt)
    (tmp_path / "cache" / ".shard-00002.safetensors.1.part").write_bytes(b"half")
    with pytest.raises(UserError, match="incomplete: 2 of 3 shards"):
        CachedLatents(tmp_path / "cache")
    base.images.clear()
    build(dataset, base, tmp_path / "cache")
    assert sum(base.images) == 2 * 1
    build(dataset, base, tmp_path / "whole")
    for shard in range(3):
        name = f"shard-{shard:05d}.safetensors"
        assert (tmp_path / "cache" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list((tmp_path / "cache").glob(".*"))


def test_a_finished_cache_is_left_alone(folder: Path, base: Base, tmp_path: Path) -> None:
    build(photos(folder), base, tmp_path / "cache")
    times = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()}
    base.images.clear()
    build(photos(folder), base, tmp_path / "cache", records_per_shard=100)
    assert base.images == []
    assert times == {file.name: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()}


@pytest.mark.parametrize("damage", ["truncated", "empty", "foreign"])
def test_a_damaged_shard_is_named_and_rebuilt(
    folder: Path, base: Base, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    cache = build(photos(folder), base, tmp_path / "cache")
    whole = cache.path(0).read_bytes()
    cache.path(0).write_bytes({"truncated": whole[:-100], "empty": b"", "foreign": FOREIGN}[damage])
    with pytest.raises(UserError, match="2 of 3 shards are whole; run build_cache again"):
        CachedLatents(cache.folder)
    assert "shard-00000.safetensors is damaged" in caplog.text
    base.captions.clear()
    build(photos(folder), base, tmp_path / "cache")
    assert "" in base.captions
    assert len(CachedLatents(cache.folder)) == 9
    assert cache.path(0).read_bytes() == whole


FOREIGN = (2).to_bytes(8, "little") + b"{}"


def test_another_fingerprint_names_what_differs(folder: Path, base: Base, tmp_path: Path) -> None:
    build(photos(folder), base, tmp_path / "cache")
    message = r"base: cached random, asked for trained; data.crops.zoom_high: cached 1.0, asked for 2; scales: .*folder"
    with pytest.raises(UserError, match=message):
        build(photos(folder, zoom_high=2), base, tmp_path / "cache", weights="trained", scales=(2.0,))
    fingerprint = cache_fingerprint("random", photos(folder), dtype=torch.float32)
    assert len(CachedLatents(tmp_path / "cache", fingerprint=fingerprint)) == 9
    with pytest.raises(UserError, match="token: cached 16, asked for 32"):
        CachedLatents(tmp_path / "cache", fingerprint=fingerprint | {"token": 32})
    (folder / "metadata.jsonl").write_text((folder / "metadata.jsonl").read_text().replace("chelsea", "a cat"))
    changed = PhotoDataset(open_photos(folder, default_caption=""), Crops(64), probe_store=tmp_path / "probes")
    with pytest.raises(UserError, match=r"data\.listing"):
        build(changed, base, tmp_path / "cache")


def test_no_cache_and_damaged_index(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no latent cache in"):
        CachedLatents(tmp_path)
    (tmp_path / "index.json").write_text('{"format": 1, ')
    with pytest.raises(UserError, match=r"index.json is damaged .* delete the folder"):
        CachedLatents(tmp_path)
    (tmp_path / "index.json").write_text('{"format": 99}')
    with pytest.raises(UserError, match="format 99, this version reads format 1"):
        CachedLatents(tmp_path)


def test_several_scales_and_draws(folder: Path, base: Base, tmp_path: Path) -> None:
    dataset = photos(folder, place="random", zoom_high=None, aspect_buckets=False)
    build(dataset, base, tmp_path / "cache", scales=(2.0, 4.0), draws=2, records_per_shard=5)
    with pytest.raises(UserError, match=r"guidance at scales \[2.0, 4.0\], not None"):
        CachedLatents(tmp_path / "cache")
    cached = CachedLatents(tmp_path / "cache", scale=2)
    assert len(cached) == 18
    assert cached[0]["guidance_latents"].shape == (4, 16, 16)
    assert CachedLatents(tmp_path / "cache", scale=4)[0]["guidance_latents"].shape == (4, 8, 8)
    for epoch in range(2):
        dataset.set_epoch(epoch)
        latents = base.encode_image(dataset[3]["image"][None])[0]
        torch.testing.assert_close(cached[9 * epoch + 3]["latents"], latents, atol=1e-5, rtol=1e-5)
    assert not torch.equal(cached[3]["latents"], cached[12]["latents"])


def test_a_picture_that_breaks_is_listed(folder: Path, base: Base, tmp_path: Path) -> None:
    dataset = photos(folder)
    (folder / "chelsea1.png").write_bytes((folder / "chelsea1.png").read_bytes()[:2000])
    build(dataset, base, tmp_path / "cache")
    cached = CachedLatents(tmp_path / "cache")
    assert len(cached) == 8
    assert [item.name for item in cached.skipped] == ["chelsea1.png"]
    assert isinstance(cached.skipped[0], Skipped)


def test_a_full_disk_leaves_whole_shards(folder: Path, base: Base, tmp_path: Path) -> None:
    """The operating system refuses files above a limit; the second shard is the first to exceed it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(UserError, match=r"no room for .*shard-00001.safetensors .*run the same command again"):
            build(
                photos(folder),
                base,
                tmp_path / "cache",
                progress=lambda *_: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1])),
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(file.name for file in (tmp_path / "cache").iterdir()) == ["index.json", "shard-00000.safetensors"]
    build(photos(folder), base, tmp_path / "cache")
    assert len(CachedLatents(tmp_path / "cache")) == 9


def test_a_folder_that_cannot_be_written(folder: Path, base: Base, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write .*choose another folder"):
        build(photos(folder), base, tmp_path / "file")


def test_latents_that_are_not_finite(folder: Path, base: Base, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not finite, in torch\.float16"):
        build_cache(
            photos(folder), lambda images: (images * 1e6).half(), base.encode_text, tmp_path / "cache", base="half"
        )


def test_reduction_is_bicubic_antialiased_and_in_whole_tokens() -> None:
    data = pytest.importorskip("skimage.data")
    image = torch.from_numpy(data.astronaut()).permute(2, 0, 1)[None, :, :192, :320].float() / 255
    reduced = reduce_pictures(image, 4)
    assert reduced.shape == (1, 3, 48, 80)
    assert torch.equal(reduced, interpolate(image, (48, 80), mode="bicubic", antialias=True).clamp(0, 1))
    assert guidance_size(240, 272, 4) == (64, 64)
    assert guidance_size(256, 256, 4, max_tokens=4) == (32, 32)
    assert reduce_pictures(image, 1) is image
    with pytest.raises(UserError, match=r"Scale is 0\.5"):
        guidance_size(256, 256, 0.5)


def test_weights_fingerprint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no weights in"):
        weights_fingerprint(tmp_path)
    (tmp_path / "vae").mkdir()
    (tmp_path / "transformer").mkdir()
    large = bytearray(3 * 2**20)
    (tmp_path / "vae" / "model.safetensors").write_bytes(large)
    before = weights_fingerprint(tmp_path)
    (tmp_path / "transformer" / "model.safetensors").write_bytes(b"trained further")
    assert weights_fingerprint(tmp_path) == before
    large[len(large) // 64 * 5] = 1
    (tmp_path / "vae" / "model.safetensors").write_bytes(large)
    assert weights_fingerprint(tmp_path) != before
