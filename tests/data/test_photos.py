"""Photographs from real files: the pictures that scikit-image and scikit-learn ship, saved in many formats."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from photo_files import dataset_of, write_tar
from PIL import Image
from torch.utils.data import DataLoader

from scale_dit.data.photos import BrokenPhoto, Skipped, collate_photos, open_photos
from scale_dit.errors import UserError


class TestSources:
    def test_folder_with_metadata_and_sidecars(self, photo_folder: Path) -> None:
        dataset = dataset_of(photo_folder)
        items = {item["name"]: item for item in (dataset[index] for index in range(len(dataset)))}
        assert {name: item["caption"] for name, item in items.items()} == {
            "astronaut.png": "an astronaut in an orange suit",
            "china.jpg": "a Chinese temple",
            "more/flower.webp": "a flower",
        }
        assert all(item["image"].shape == (3, 64, 64) for item in items.values())
        assert all(item["image"].dtype == torch.float32 for item in items.values())

    def test_metadata_in_a_subfolder_is_relative_to_it(self, photo_folder: Path) -> None:
        (photo_folder / "metadata.jsonl").unlink()
        (photo_folder / "more" / "metadata.jsonl").write_text('{"file_name": "flower.webp", "caption": "below"}')
        source = open_photos(photo_folder, default_caption="")
        assert dict(zip(source.names, source.captions, strict=True))["more/flower.webp"] == "below"

    def test_missing_captions_need_a_default(self, photo_folder: Path) -> None:
        (photo_folder / "china.txt").write_text("  \n")
        with pytest.raises(UserError, match=r"1 of 3 pictures .*\(china.jpg\).*default_caption"):
            open_photos(photo_folder)
        assert open_photos(photo_folder, default_caption="a photograph").captions[1] == "a photograph"

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
    def test_broken_metadata_names_its_line(self, photo_folder: Path, line: str, message: str) -> None:
        (photo_folder / "metadata.jsonl").write_text(line)
        with pytest.raises(UserError, match=message):
            open_photos(photo_folder)

    def test_captions_in_another_encoding(self, photo_folder: Path) -> None:
        (photo_folder / "china.txt").write_bytes("café".encode("latin-1"))
        with pytest.raises(UserError, match=r"china.txt is not UTF-8 \(byte 3\)"):
            open_photos(photo_folder)

    def test_nothing_there_and_several_kinds(self, tmp_path: Path, photo_folder: Path) -> None:
        with pytest.raises(UserError, match="no such file or folder"):
            open_photos(tmp_path / "absent")
        (tmp_path / "empty").mkdir()
        with pytest.raises(UserError, match="no pictures in"):
            open_photos(tmp_path / "empty")
        (photo_folder / "extra.tar").write_bytes(b"")
        with pytest.raises(UserError, match=r"several kinds .*\(folder, webdataset\).*kind="):
            open_photos(photo_folder)
        assert len(open_photos(photo_folder, kind="folder")) == 3
        with pytest.raises(UserError, match="choose one of folder, webdataset, parquet"):
            open_photos(photo_folder, kind="zip")

    def test_webdataset_reads_in_place(self, tmp_path: Path, photo_folder: Path) -> None:
        archive = tmp_path / "shards" / "000.tar"
        archive.parent.mkdir()
        files = {
            "a.jpg": (photo_folder / "china.jpg").read_bytes(),
            "a.txt": b"temple",
            "b.png": (photo_folder / "astronaut.png").read_bytes(),
            "b.json": json.dumps({"prompt": "an astronaut", "width": 3}).encode(),
            "c.webp": (photo_folder / "more" / "flower.webp").read_bytes(),
        }
        write_tar(archive, files)
        with pytest.raises(UserError, match=r"1 of 3 pictures .*000.tar/c.webp"):
            open_photos(archive)
        dataset = dataset_of(archive, default_caption="")
        assert list(dataset.source.names) == ["000.tar/a.jpg", "000.tar/b.png", "000.tar/c.webp"]
        assert list(dataset.source.captions) == ["temple", "an astronaut", ""]
        reference = dataset_of(photo_folder)
        assert torch.equal(dataset[1]["image"], reference[0]["image"])
        assert dataset.skipped == []

    def test_archives_of_one_name_keep_apart(self, tmp_path: Path, photo_folder: Path) -> None:
        data = (photo_folder / "china.jpg").read_bytes()
        for part in ("one", "two"):
            (tmp_path / "shards" / part).mkdir(parents=True)
            write_tar(tmp_path / "shards" / part / "0.tar", {"a.jpg": data, "a.txt": part.encode()})
        source = open_photos(tmp_path / "shards")
        assert list(zip(source.names, source.captions, strict=True)) == [
            ("one/0.tar/a.jpg", "one"),
            ("two/0.tar/a.jpg", "two"),
        ]

    def test_truncated_tar_is_named_and_its_whole_pictures_used(self, tmp_path: Path, photo_folder: Path) -> None:
        archive = tmp_path / "cut.tar"
        data = (photo_folder / "china.jpg").read_bytes()
        write_tar(archive, {"a.jpg": data, "a.txt": b"one", "b.jpg": data, "b.txt": b"two"})
        archive.write_bytes(archive.read_bytes()[: len(data) + 4096])
        source = open_photos(archive)
        assert list(source.names) == ["cut.tar/a.jpg"]
        assert "breaks off" in str(source.skipped[0])
        assert source.skipped[0].name == "cut.tar"

    def test_parquet_as_datasets_writes_it(self, tmp_path: Path, photo_folder: Path) -> None:
        datasets = pytest.importorskip("datasets")
        table = datasets.Dataset.from_dict(
            {
                "picture": [str(photo_folder / "astronaut.png"), str(photo_folder / "china.jpg")],
                "caption": ["one", "two"],
            }
        ).cast_column("picture", datasets.Image())
        shards = tmp_path / "parquet"
        shards.mkdir()
        table.to_parquet(shards / "a.parquet")
        table.select([1]).to_parquet(shards / "b.parquet")
        (shards / "c.parquet").write_bytes(b"PAR1 but not really")
        dataset = dataset_of(shards)
        assert list(dataset.source.names) == ["a.parquet:0", "a.parquet:1", "b.parquet:0"]
        assert list(dataset.source.captions) == ["one", "two", "two"]
        assert torch.equal(dataset[0]["image"], dataset_of(photo_folder)[0]["image"])
        assert [item.name for item in dataset.skipped] == ["c.parquet"]

    def test_parquet_of_raw_bytes_and_wrong_columns(self, tmp_path: Path, photo_folder: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        path = tmp_path / "raw.parquet"
        data = (photo_folder / "china.jpg").read_bytes()
        pyarrow.parquet.write_table(pyarrow.table({"jpeg": [data, None], "alt": ["temple", None]}), path)
        store = tmp_path / "store"
        with pytest.raises(UserError, match="no caption column 'caption' or 'text' or 'prompt'; columns: jpeg, alt"):
            open_photos(path, store=store)
        with pytest.raises(UserError, match="columns that hold pictures: jpeg; image_field='png' is none of them"):
            open_photos(path, store=store, image_field="png")
        dataset = dataset_of(path, caption_field="alt", default_caption="")
        assert len(dataset) == 1
        assert [item.name for item in dataset.skipped] == ["raw.parquet:1"]


class TestSkipping:
    def test_bad_files_are_named_counted_and_not_replaced(
        self, photo_folder: Path, caplog: pytest.LogCaptureFixture, china: Image.Image
    ) -> None:
        (photo_folder / "cut.jpg").write_bytes((photo_folder / "china.jpg").read_bytes()[:-4000])
        (photo_folder / "empty.png").write_bytes(b"")
        (photo_folder / "text.png").write_text("I am no picture")
        (photo_folder / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
        china.resize((40, 30)).save(photo_folder / "small.png")
        with (photo_folder / "metadata.jsonl").open("a") as file:
            file.write('\n{"file_name": "gone.png", "text": "gone"}')
        with caplog.at_level(logging.WARNING):
            dataset = dataset_of(photo_folder, default_caption="")
        assert len(dataset) == 3
        reasons = {Path(item.name).name: item.reason for item in dataset.skipped}
        assert reasons.keys() == {"cut.jpg", "empty.png", "text.png", "phone.heic", "small.png", "gone.png"}
        assert "truncated" in reasons["cut.jpg"]
        assert "not a picture" in reasons["text.png"]
        assert "30x40 px is smaller than the crop of 64x64 px" in reasons["small.png"]
        assert "6 of 9 pictures skipped" in dataset.report()
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

    def test_probe_is_kept_until_a_file_changes(self, photo_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        store = photo_folder.parent / "probes"
        dataset_of(photo_folder)
        (kept,) = store.iterdir()
        written = kept.stat().st_mtime_ns
        dataset_of(photo_folder)
        assert [file.stat().st_mtime_ns for file in store.iterdir()] == [written]
        (photo_folder / "china.jpg").write_bytes(b"now broken")
        assert [item.name for item in dataset_of(photo_folder).skipped] == ["china.jpg"]
        for file in store.iterdir():
            file.write_text('{"half": ')
        assert len(dataset_of(photo_folder)) == 2
        assert "is damaged; reading the pictures again" in caplog.text

    def test_a_file_that_is_cut_later_stands_out(self, photo_folder: Path) -> None:
        dataset = dataset_of(photo_folder)
        for name in ("astronaut.png", "china.jpg", "more/flower.webp"):
            (photo_folder / name).write_bytes((photo_folder / name).read_bytes()[:3000])
        assert all(isinstance(dataset[index], BrokenPhoto) for index in range(3))

    @pytest.mark.parametrize("workers", [0, 1])
    def test_a_file_that_breaks_later_is_dropped_from_its_batch(self, photo_folder: Path, workers: int) -> None:
        dataset = dataset_of(photo_folder)
        (photo_folder / "china.jpg").unlink()
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
