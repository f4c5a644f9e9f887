"""Photographs from real files: the pictures that scikit-image and scikit-learn ship, saved in many formats."""

from __future__ import annotations

import io
import json
import logging
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms
from torch.utils.data import DataLoader

from scale_dit.data.buckets import BucketBatchSampler, bucket_sizes, nearest_bucket
from scale_dit.data.crops import Crops
from scale_dit.data.decode import PictureError, open_picture, to_rgb, upright_size
from scale_dit.data.photos import BrokenPhoto, PhotoDataset, Skipped, collate_photos, open_photos
from scale_dit.errors import UserError


@pytest.fixture(scope="module")
def astronaut() -> Image.Image:
    data = pytest.importorskip("skimage.data")
    return Image.fromarray(data.astronaut()).crop((100, 0, 292, 160))


@pytest.fixture(scope="module")
def china() -> Image.Image:
    images = pytest.importorskip("sklearn.datasets")
    return Image.fromarray(images.load_sample_image("china.jpg"))


@pytest.fixture(scope="module")
def flower() -> Image.Image:
    images = pytest.importorskip("sklearn.datasets")
    return Image.fromarray(images.load_sample_image("flower.jpg"))


@pytest.fixture
def folder(tmp_path: Path, astronaut: Image.Image, china: Image.Image, flower: Image.Image) -> Path:
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


def dataset_of(path: Path, crops: Crops | None = None, **options: object) -> PhotoDataset:
    source = open_photos(path, store=path.parent / "store", **options)  # type: ignore[arg-type]
    return PhotoDataset(source, crops or Crops(64, place="centre"), probe_store=path.parent / "probes")


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def reopened(image: Image.Image, format: str, **options: object) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return open_picture(buffer.getvalue())


class TestToRgb:
    def test_rgb_is_exact(self, astronaut: Image.Image) -> None:
        assert torch.equal(to_rgb(reopened(astronaut, "PNG")), pixels(astronaut))

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_exif_orientation_shows_the_same_picture(self, astronaut: Image.Image, orientation: int) -> None:
        stored = {
            1: None,
            2: Image.Transpose.FLIP_LEFT_RIGHT,
            3: Image.Transpose.ROTATE_180,
            4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE,
            6: Image.Transpose.ROTATE_90,
            7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_270,
        }[orientation]
        exif = Image.Exif()
        exif[0x0112] = orientation
        turned = astronaut if stored is None else astronaut.transpose(stored)
        image = reopened(turned, "PNG", exif=exif)
        assert upright_size(image) == (160, 192)
        assert torch.equal(to_rgb(image), pixels(astronaut))

    def test_transparency_is_laid_over_white(self, astronaut: Image.Image) -> None:
        layered = astronaut.convert("RGBA")
        layered.putalpha(Image.new("L", astronaut.size, 51))
        expected = 0.2 * pixels(astronaut) + 0.8
        torch.testing.assert_close(to_rgb(reopened(layered, "PNG")), expected, atol=1.01 / 255, rtol=0)

    def test_transparent_grey_palette_and_colour_key_are_laid_over_white(self, astronaut: Image.Image) -> None:
        grey = Image.merge("LA", (astronaut.convert("L"), Image.new("L", astronaut.size, 0)))
        assert to_rgb(reopened(grey, "PNG")).min() == 1
        palette = astronaut.quantize(16)
        keyed = np.array(palette) == 0
        result = to_rgb(reopened(palette, "PNG", transparency=0))
        assert keyed.any()
        assert result[:, torch.from_numpy(keyed)].min() == 1
        red = Image.new("RGB", (32, 32), (255, 0, 0))
        assert to_rgb(reopened(red, "PNG", transparency=(255, 0, 0))).min() == 1

    def test_greyscale_one_bit_and_palette(self, astronaut: Image.Image) -> None:
        grey = to_rgb(reopened(astronaut.convert("L"), "PNG"))
        assert torch.equal(grey[0], grey[1])
        assert torch.equal(grey[0], torch.from_numpy(np.array(astronaut.convert("L"))).float() / 255)
        assert set(to_rgb(reopened(astronaut.convert("1"), "TIFF")).unique().tolist()) == {0.0, 1.0}
        palette = astronaut.quantize(64)
        assert torch.equal(to_rgb(reopened(palette, "GIF")), pixels(palette.convert("RGB")))

    def test_cmyk_jpeg_looks_like_its_original(self, astronaut: Image.Image) -> None:
        image = reopened(astronaut.convert("CMYK"), "JPEG", quality=95)
        assert image.mode == "CMYK"
        assert (to_rgb(image) - pixels(astronaut)).abs().mean() < 0.02

    @pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
    def test_sixteen_bits_are_scaled_and_not_clipped(self, astronaut: Image.Image, format: str) -> None:
        grey = np.array(astronaut.convert("L")).astype(np.uint16) * 256 + 77
        image = reopened(Image.fromarray(grey), format)
        assert image.mode in ("I;16", "I")
        result = to_rgb(image)
        torch.testing.assert_close(result[1], torch.from_numpy(grey.astype(np.float32) / 65535))
        # More levels than eight bits have: the low byte survives a resize that averages.
        assert len(to_rgb(image, size=(16, 16)).unique()) > 16

    def test_big_endian_sixteen_bits(self, tmp_path: Path) -> None:
        import tifffile

        grey = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
        tifffile.imwrite(tmp_path / "big.tif", grey, byteorder=">")
        result = to_rgb(open_picture(tmp_path / "big.tif"))
        torch.testing.assert_close(result[0], torch.from_numpy(grey.astype(np.float32) / 65535))

    def test_float_samples_and_undefined_white(self) -> None:
        half = reopened(Image.new("F", (8, 8), 0.5), "TIFF")
        assert to_rgb(half).unique().tolist() == [0.5]
        with pytest.raises(PictureError, match="from 3 to 3, expected 0 to 1"):
            to_rgb(reopened(Image.new("F", (8, 8), 3), "TIFF"))
        with pytest.raises(PictureError, match="no defined white"):
            to_rgb(reopened(Image.new("I", (8, 8), 3), "TIFF"))

    def test_embedded_profile_is_converted_to_srgb(self, astronaut: Image.Image) -> None:
        lab = ImageCms.profileToProfile(
            astronaut, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
        )
        assert lab is not None
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
        image = reopened(lab, "TIFF", icc_profile=profile)
        assert (to_rgb(image) - pixels(astronaut)).abs().mean() < 0.02
        del image.info["icc_profile"]
        with pytest.raises(PictureError, match="Lab"):
            to_rgb(image)

    def test_a_profile_for_other_pixels_is_ignored(self, astronaut: Image.Image) -> None:
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
        assert torch.equal(to_rgb(reopened(astronaut, "PNG", icc_profile=profile)), pixels(astronaut))

    def test_cut_then_resize_equals_resize_of_the_cut(self, astronaut: Image.Image) -> None:
        image = reopened(astronaut, "PNG")
        cut = astronaut.crop((32, 16, 160, 144)).resize((64, 64), Image.Resampling.BICUBIC)
        result = to_rgb(image, (32, 16, 160, 144), (64, 64))
        # At the border the filter reads the photograph's own neighbouring pixels, which the cut no longer has.
        assert torch.equal(result[:, 2:-2, 2:-2], pixels(cut)[:, 2:-2, 2:-2])


class TestSources:
    def test_folder_with_metadata_and_sidecars(self, folder: Path) -> None:
        dataset = dataset_of(folder)
        items = {item["name"]: item for item in (dataset[index] for index in range(len(dataset)))}
        assert {name: item["caption"] for name, item in items.items()} == {
            "astronaut.png": "an astronaut in an orange suit",
            "china.jpg": "a Chinese temple",
            "more/flower.webp": "a flower",
        }
        assert all(item["image"].shape == (3, 64, 64) for item in items.values())
        assert all(item["image"].dtype == torch.float32 for item in items.values())

    def test_metadata_in_a_subfolder_is_relative_to_it(self, folder: Path) -> None:
        (folder / "metadata.jsonl").unlink()
        (folder / "more" / "metadata.jsonl").write_text('{"file_name": "flower.webp", "caption": "below"}')
        source = open_photos(folder, default_caption="")
        assert dict(zip(source.names, source.captions, strict=True))["more/flower.webp"] == "below"

    def test_missing_captions_need_a_default(self, folder: Path) -> None:
        (folder / "china.txt").write_text("  \n")
        with pytest.raises(UserError, match=r"1 of 3 pictures .*\(china.jpg\).*default_caption"):
            open_photos(folder)
        assert open_photos(folder, default_caption="a photograph").captions[1] == "a photograph"

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{broken", "line 1: not valid JSON"),
            ('{"text": "x"}', "no 'file_name'"),
            ('{"file_name": "china.jpg", "text": 3}', "'text' is int, expected a string"),
            ("[]", "expected a JSON object, found list"),
            (
                '{"file_name": "a.png", "text": "x"}\n{"file_name": "a.png", "text": "y"}',
                "line 2: a.png is listed twice",
            ),
        ],
    )
    def test_broken_metadata_names_its_line(self, folder: Path, line: str, message: str) -> None:
        (folder / "metadata.jsonl").write_text(line)
        with pytest.raises(UserError, match=message):
            open_photos(folder)

    def test_captions_in_another_encoding(self, folder: Path) -> None:
        (folder / "china.txt").write_bytes("café".encode("latin-1"))
        with pytest.raises(UserError, match=r"china.txt is not UTF-8 \(byte 3\)"):
            open_photos(folder)

    def test_nothing_there_and_several_kinds(self, tmp_path: Path, folder: Path) -> None:
        with pytest.raises(UserError, match="no such file or folder"):
            open_photos(tmp_path / "absent")
        (tmp_path / "empty").mkdir()
        with pytest.raises(UserError, match="no pictures in"):
            open_photos(tmp_path / "empty")
        (folder / "extra.tar").write_bytes(b"")
        with pytest.raises(UserError, match=r"several kinds .*\(folder, webdataset\).*kind="):
            open_photos(folder)
        assert len(open_photos(folder, kind="folder")) == 3
        with pytest.raises(UserError, match="choose one of folder, webdataset, parquet"):
            open_photos(folder, kind="zip")

    def test_webdataset_reads_in_place(self, tmp_path: Path, folder: Path) -> None:
        archive = tmp_path / "shards" / "000.tar"
        archive.parent.mkdir()
        files = {
            "a.jpg": (folder / "china.jpg").read_bytes(),
            "a.txt": b"temple",
            "b.png": (folder / "astronaut.png").read_bytes(),
            "b.json": json.dumps({"prompt": "an astronaut", "width": 3}).encode(),
            "c.webp": (folder / "more" / "flower.webp").read_bytes(),
        }
        write_tar(archive, files)
        with pytest.raises(UserError, match=r"1 of 3 pictures .*000.tar/c.webp"):
            open_photos(archive)
        dataset = dataset_of(archive, default_caption="")
        assert list(dataset.source.names) == ["000.tar/a.jpg", "000.tar/b.png", "000.tar/c.webp"]
        assert list(dataset.source.captions) == ["temple", "an astronaut", ""]
        reference = dataset_of(folder)
        assert torch.equal(dataset[1]["image"], reference[0]["image"])
        assert dataset.skipped == []

    def test_truncated_tar_is_named_and_its_whole_pictures_used(self, tmp_path: Path, folder: Path) -> None:
        archive = tmp_path / "cut.tar"
        data = (folder / "china.jpg").read_bytes()
        write_tar(archive, {"a.jpg": data, "a.txt": b"one", "b.jpg": data, "b.txt": b"two"})
        archive.write_bytes(archive.read_bytes()[: len(data) + 4096])
        source = open_photos(archive)
        assert list(source.names) == ["cut.tar/a.jpg"]
        assert "breaks off" in str(source.skipped[0])
        assert source.skipped[0].name == "cut.tar"

    def test_parquet_as_datasets_writes_it(self, tmp_path: Path, folder: Path) -> None:
        datasets = pytest.importorskip("datasets")
        table = datasets.Dataset.from_dict(
            {"picture": [str(folder / "astronaut.png"), str(folder / "china.jpg")], "caption": ["one", "two"]}
        ).cast_column("picture", datasets.Image())
        shards = tmp_path / "parquet"
        shards.mkdir()
        table.to_parquet(shards / "a.parquet")
        table.select([1]).to_parquet(shards / "b.parquet")
        (shards / "c.parquet").write_bytes(b"PAR1 but not really")
        dataset = dataset_of(shards)
        assert list(dataset.source.names) == ["a.parquet:0", "a.parquet:1", "b.parquet:0"]
        assert list(dataset.source.captions) == ["one", "two", "two"]
        assert torch.equal(dataset[0]["image"], dataset_of(folder)[0]["image"])
        assert [item.name for item in dataset.skipped] == ["c.parquet"]

    def test_parquet_of_raw_bytes_and_wrong_columns(self, tmp_path: Path, folder: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        path = tmp_path / "raw.parquet"
        data = (folder / "china.jpg").read_bytes()
        pyarrow.parquet.write_table(pyarrow.table({"jpeg": [data, None], "alt": ["temple", None]}), path)
        store = tmp_path / "store"
        with pytest.raises(UserError, match="no caption column 'caption' or 'text' or 'prompt'; columns: jpeg, alt"):
            open_photos(path, store=store)
        with pytest.raises(UserError, match="columns that hold pictures: jpeg; image_field='png' is none of them"):
            open_photos(path, store=store, image_field="png")
        dataset = dataset_of(path, caption_field="alt", default_caption="")
        assert len(dataset) == 1
        assert [item.name for item in dataset.skipped] == ["raw.parquet:1"]


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


class TestSkipping:
    def test_bad_files_are_named_counted_and_not_replaced(
        self, folder: Path, caplog: pytest.LogCaptureFixture, china: Image.Image
    ) -> None:
        (folder / "cut.jpg").write_bytes((folder / "china.jpg").read_bytes()[:-4000])
        (folder / "empty.png").write_bytes(b"")
        (folder / "text.png").write_text("I am no picture")
        china.resize((40, 30)).save(folder / "small.png")
        with (folder / "metadata.jsonl").open("a") as file:
            file.write('\n{"file_name": "gone.png", "text": "gone"}')
        with caplog.at_level(logging.WARNING):
            dataset = dataset_of(folder, default_caption="")
        assert len(dataset) == 3
        reasons = {Path(item.name).name: item.reason for item in dataset.skipped}
        assert reasons.keys() == {"cut.jpg", "empty.png", "text.png", "small.png", "gone.png"}
        assert "truncated" in reasons["cut.jpg"]
        assert "not a picture" in reasons["text.png"]
        assert "30x40 px is smaller than the crop of 64x64 px" in reasons["small.png"]
        assert "5 of 8 pictures skipped" in dataset.report()
        assert all(name in caplog.text for name in reasons)
        names = [dataset[index]["name"] for index in range(len(dataset))]
        assert names == ["astronaut.png", "china.jpg", "more/flower.webp"]

    @pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"])
    @pytest.mark.parametrize("keep", [0.02, 0.5, 0.9])
    def test_truncated_files_of_any_format(self, tmp_path: Path, china: Image.Image, format: str, keep: float) -> None:
        root = tmp_path / "photos"
        root.mkdir()
        china.save(root / "whole.png")
        china.save(root / f"cut.{format.lower()}", format)
        data = (root / f"cut.{format.lower()}").read_bytes()
        (root / f"cut.{format.lower()}").write_bytes(data[: int(len(data) * keep)])
        dataset = dataset_of(root, default_caption="")
        assert [item.name for item in dataset.skipped] == [f"cut.{format.lower()}"]

    def test_no_usable_picture_is_an_error(self, tmp_path: Path) -> None:
        root = tmp_path / "bad"
        root.mkdir()
        (root / "a.png").write_bytes(b"no")
        with pytest.raises(UserError, match=r"none of the 1 pictures .* is usable"):
            dataset_of(root, default_caption="")

    def test_probe_is_kept_until_a_file_changes(self, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        store = folder.parent / "probes"
        dataset_of(folder)
        (kept,) = store.iterdir()
        written = kept.stat().st_mtime_ns
        dataset_of(folder)
        assert [file.stat().st_mtime_ns for file in store.iterdir()] == [written]
        (folder / "china.jpg").write_bytes(b"now broken")
        assert [item.name for item in dataset_of(folder).skipped] == ["china.jpg"]
        for file in store.iterdir():
            file.write_text('{"half": ')
        assert len(dataset_of(folder)) == 2
        assert "is damaged; reading the pictures again" in caplog.text

    def test_a_file_that_is_cut_later_stands_out(self, folder: Path) -> None:
        dataset = dataset_of(folder)
        for name in ("astronaut.png", "china.jpg", "more/flower.webp"):
            (folder / name).write_bytes((folder / name).read_bytes()[:3000])
        assert all(isinstance(dataset[index], BrokenPhoto) for index in range(3))

    @pytest.mark.parametrize("workers", [0, 1])
    def test_a_file_that_breaks_later_is_dropped_from_its_batch(self, folder: Path, workers: int) -> None:
        dataset = dataset_of(folder)
        (folder / "china.jpg").unlink()
        loader = DataLoader(dataset, batch_size=3, collate_fn=collate_photos, num_workers=workers)
        for _ in range(2):
            (batch,) = loader
            dataset.note_skipped(batch["skipped"])
        assert batch["name"] == ["astronaut.png", "more/flower.webp"]
        assert batch["image"].shape == (2, 3, 64, 64)
        assert dataset.skipped == [Skipped("china.jpg", "no such file")]

    def test_a_batch_of_broken_pictures_is_empty(self) -> None:
        batch = collate_photos([BrokenPhoto("a.png", "gone", (64, 48))])
        assert batch["image"].shape == (0, 3, 64, 48)
        assert batch["caption"] == []
        assert batch["skipped"] == [Skipped("a.png", "gone")]


class TestCrops:
    @given(
        height=st.integers(64, 4000),
        width=st.integers(64, 4000),
        zoom_high=st.sampled_from([1.0, 1.5, 8.0, None]),
        seed=st.integers(0, 1000),
        buckets=st.booleans(),
    )
    @settings(deadline=None, max_examples=60)
    def test_cuts_lie_inside_and_never_enlarge(
        self, height: int, width: int, zoom_high: float | None, seed: int, buckets: bool
    ) -> None:
        crops = Crops(64, zoom_high=zoom_high, aspect_buckets=buckets, enlarge=True)
        bucket = crops.bucket(height, width)
        left, top, right, bottom = crops.box(height, width, bucket, np.random.default_rng(seed))
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        rows, columns = crops.sizes[bucket]
        assert (bottom - top) / rows == pytest.approx((right - left) / columns, rel=1e-3)
        widest = min(height / rows, width / columns)
        assert (bottom - top) / rows >= min(1.0, widest) * 0.999
        if zoom_high == 1.0:
            assert (bottom - top) / rows == pytest.approx(widest)

    def test_zoom_is_log_uniform(self) -> None:
        crops = Crops(64, zoom_high=8)
        random = np.random.default_rng(0)
        sides = [box[2] - box[0] for box in (crops.box(1024, 1024, 0, random) for _ in range(4000))]
        octaves = np.histogram(np.log2(1024 / np.array(sides)), bins=[0, 1, 2, 3])[0] / len(sides)
        assert np.abs(octaves - 1 / 3).max() < 0.03

    def test_random_cuts_follow_seed_epoch_and_index_only(self, folder: Path) -> None:
        crops = Crops(64, zoom_high=None)
        first, second = dataset_of(folder, crops), dataset_of(folder, crops)
        assert torch.equal(first[1]["image"], second[1]["image"])
        first.set_epoch(1)
        assert not torch.equal(first[1]["image"], second[1]["image"])
        first.set_epoch(0)
        assert torch.equal(first[1]["image"], second[1]["image"])

    def test_workers_that_live_on_see_the_new_epoch(self, folder: Path) -> None:
        dataset = dataset_of(folder, Crops(64, zoom_high=None))
        loader = DataLoader(dataset, batch_size=3, collate_fn=collate_photos, num_workers=1, persistent_workers=True)
        before = next(iter(loader))["image"]
        dataset.set_epoch(5)
        after = next(iter(loader))["image"]
        assert torch.equal(after, collate_photos([dataset[index] for index in range(3)])["image"])
        assert not torch.equal(before, after)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"size": 250}, "height 250 px is not a positive multiple of the token size 16 px; use 256"),
            ({"size": 0}, "use 16"),
            ({"place": "left"}, "choose one of random, centre"),
            ({"zoom_low": 0.5}, "zoom_low=0.5 must be at least 1"),
            ({"zoom_low": 4, "zoom_high": 2}, "zoom_high=2 is below zoom_low=4"),
            ({"size": (64, 128), "aspect_buckets": True}, "square"),
            ({"aspect_buckets": True, "max_aspect": 0.5}, "max_aspect=0.5"),
        ],
    )
    def test_wrong_options(self, options: dict[str, object], message: str) -> None:
        with pytest.raises(UserError, match=message):
            assert Crops(**options).sizes  # type: ignore[arg-type]


class TestBuckets:
    @given(tokens=st.integers(1, 64), max_aspect=st.floats(1, 4))
    @settings(deadline=None, max_examples=40)
    def test_sizes_are_whole_tokens_of_equal_area(self, tokens: int, max_aspect: float) -> None:
        side = tokens * 16
        sizes = bucket_sizes(side, 16, max_aspect)
        assert (side, side) in sizes
        assert len(set(sizes)) == len(sizes)
        for height, width in sizes:
            assert height % 16 == width % 16 == 0
            assert max(height, width) / min(height, width) <= max_aspect + 1e-9
            assert (width, height) in sizes
            assert abs(height * width - side**2) <= min(height, width) * 8

    def test_photographs_go_to_the_nearest_aspect(self, folder: Path) -> None:
        sizes = bucket_sizes(64, 16, 2)
        assert sizes == ((80, 48), (64, 64), (48, 80))
        assert sizes[nearest_bucket(427, 640, sizes)] == (48, 80)
        dataset = dataset_of(folder, Crops(64, aspect_buckets=True))
        shapes = {item["name"]: tuple(item["image"].shape[1:]) for item in (dataset[i] for i in range(3))}
        assert shapes == {"astronaut.png": (64, 64), "china.jpg": (48, 80), "more/flower.webp": (80, 48)}

    @given(
        buckets=st.lists(st.integers(0, 3), min_size=30, max_size=80),
        batch_size=st.integers(1, 4),
        ranks=st.integers(1, 3),
        drop_last=st.booleans(),
        epoch=st.integers(0, 3),
    )
    @settings(deadline=None, max_examples=60)
    def test_batches(self, buckets: list[int], batch_size: int, ranks: int, drop_last: bool, epoch: int) -> None:
        class Pictures:
            bucket_of = buckets

        batches = []
        for rank in range(ranks):
            sampler = BucketBatchSampler(Pictures(), batch_size, drop_last=drop_last, seed=7, rank=rank, ranks=ranks)
            sampler.set_epoch(epoch)
            own = list(sampler)
            assert own == list(sampler)
            assert len(own) == len(sampler)
            sampler.set_epoch(epoch, start=1)
            assert list(sampler) == own[1:]
            batches += own
        seen = [index for batch in batches for index in batch]
        assert len(seen) == len(set(seen))
        for batch in batches:
            assert len({buckets[index] for index in batch}) == 1
            assert len(batch) == batch_size or not drop_last
        if ranks == 1 and not drop_last:
            assert sorted(seen) == list(range(len(buckets)))

    def test_epochs_differ_and_reach_the_dataset(self, folder: Path) -> None:
        dataset = dataset_of(folder)
        sampler = BucketBatchSampler(dataset, 1, seed=3)
        orders = set()
        for epoch in range(6):
            sampler.sampler.set_epoch(epoch)
            orders.add(str(list(sampler)))
        assert len(orders) > 1
        assert dataset.epoch == 5

    def test_too_few_pictures_for_a_batch(self, folder: Path) -> None:
        dataset = dataset_of(folder)
        with pytest.raises(UserError, match=r"3 pictures in 1 bucket.* one batch of 4"):
            BucketBatchSampler(dataset, 4)
        with pytest.raises(UserError, match="batch_size=0"):
            BucketBatchSampler(dataset, 0)
        with pytest.raises(UserError, match="rank=2"):
            BucketBatchSampler(dataset, 1, rank=2, ranks=2)
        loader = DataLoader(dataset, batch_sampler=BucketBatchSampler(dataset, 2), collate_fn=collate_photos)
        assert [len(batch["name"]) for batch in loader] == [2]
