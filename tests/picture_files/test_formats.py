"""Every format holds the picture and what it was made with; 16 bits are real; large pictures are never whole."""

from __future__ import annotations

import io
import json
import logging
import tracemalloc

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from small_bases import noise
from torchvision.io import ImageReadMode, decode_png

from scale_dit.errors import UserError
from scale_dit.files import atomic_file
from scale_dit.picture_files import FORMATS, load_picture, picture_format, read_provenance, write_picture
from scale_dit.picture_files.png import write_png

PROVENANCE = {"prompt": 'a “red” ring, 100 % "é"\n', "seed": 3, "config": {"steps": 2}}
HEIGHT, WIDTH = 37, 600


def picture(height: int = HEIGHT, width: int = WIDTH) -> torch.Tensor:
    return (noise(3, height, width) / 6 + 0.5).clamp(0, 1)


def bands(image: torch.Tensor, *rows: int):
    return image.split(list(rows), dim=1)


@pytest.mark.parametrize("name", FORMATS)
def test_picture_and_provenance_come_back(tmp_path, name):
    how, image = picture_format(name), picture()
    how.check(None)
    path = tmp_path / f"a{how.suffix}"
    write_picture(path, bands(image, 1, 20, 16), HEIGHT, WIDTH, PROVENANCE, how)
    assert read_provenance(path) == PROVENANCE
    if how.suffix == ".tiff":
        read = torch.from_numpy(tifffile.imread(path).astype(np.int32)).permute(2, 0, 1)
    elif how.bits == 16:
        data = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
        read = decode_png(data, ImageReadMode.UNCHANGED).to(torch.int32)
    else:
        read = load_picture(path).to(torch.int32)
    assert torch.equal(read, (image * (2**how.bits - 1)).round().to(torch.int32))
    assert [file.name for file in tmp_path.iterdir()] == [path.name], "nothing beside it"


def test_sixteen_bits_are_more_than_eight(tmp_path):
    ramp = torch.linspace(0, 1, 4096).expand(3, 1, 4096)
    write_picture(tmp_path / "a.tiff", [ramp], 1, 4096, None, FORMATS["tiff16"])
    assert len(np.unique(tifffile.imread(tmp_path / "a.tiff"))) == 4096


def test_tiff_is_big_and_tiled(tmp_path):
    image = picture(1030, 700)
    write_picture(tmp_path / "a.tiff", bands(image, 500, 13, 517), 1030, 700, PROVENANCE, FORMATS["tiff"])
    with tifffile.TiffFile(tmp_path / "a.tiff") as file:
        page = file.pages.first
        assert file.is_bigtiff
        assert (page.tilelength, page.tilewidth, len(page.dataoffsets)) == (512, 512, 6)
        assert np.array_equal(page.asarray(), (image * 255).round().byte().permute(1, 2, 0).numpy())


@pytest.mark.parametrize("name", ["webp", "jxl"])
def test_quality_makes_files_smaller(tmp_path, name):
    how, image = picture_format(name), picture()[:1].expand(3, -1, -1)
    for quality in (None, 60):
        write_picture(tmp_path / f"{quality}{how.suffix}", [image], HEIGHT, WIDTH, PROVENANCE, how, quality)
    whole, lossy = (tmp_path / f"{quality}{how.suffix}" for quality in (None, 60))
    assert lossy.stat().st_size < whole.stat().st_size / 2
    difference = load_picture(lossy).float() - load_picture(whole).float()
    assert 0 < difference.abs().mean() < 20


@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_file_has_no_provenance(tmp_path, name):
    how = picture_format(name)
    path = tmp_path / f"a{how.suffix}"
    assert read_provenance(path) is None
    write_picture(path, [picture()], HEIGHT, WIDTH, PROVENANCE, how)
    path.write_bytes(path.read_bytes()[:-2000])
    assert read_provenance(path) is None


def test_metadata_that_does_not_fit_is_kept_beside_the_picture(tmp_path, caplog):
    path, long = tmp_path / "a.png", {"prompt": "x" * 2_000_000}
    with caplog.at_level(logging.WARNING):
        write_picture(path, [picture()], HEIGHT, WIDTH, long)
    assert "cannot be written" in caplog.text
    assert "a.json" in caplog.text
    assert load_picture(path).shape == (3, HEIGHT, WIDTH)
    assert read_provenance(path) == json.loads((tmp_path / "a.json").read_text()) == long
    write_picture(path, [picture()], HEIGHT, WIDTH, PROVENANCE)
    assert read_provenance(path) == PROVENANCE
    assert not (tmp_path / "a.json").exists(), "of the earlier picture"
    write_picture(tmp_path / "a.tiff", [picture()], HEIGHT, WIDTH, long, FORMATS["tiff"])
    assert read_provenance(tmp_path / "a.tiff") == long


def test_a_large_picture_is_never_whole(tmp_path):
    height, width, rows = 8192, 2048, 64
    for name in ("png", "tiff16"):
        tracemalloc.start()
        band = torch.rand(3, rows, width)
        with atomic_file(tmp_path / "a") as file:
            values = (np.ascontiguousarray((band * 255).byte().permute(1, 2, 0)) for _ in range(height // rows))
            FORMATS[name].write(file, values, height, width, 8, lambda: None, None)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < height * width * 3 / 3, name


def test_pictures_above_pillows_limit_are_read(tmp_path, monkeypatch):
    write_picture(tmp_path / "a.png", [picture(64, 64)], 64, 64, PROVENANCE)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(tmp_path / "a.png")
    assert read_provenance(tmp_path / "a.png") == PROVENANCE
    assert load_picture(tmp_path / "a.png").shape == (3, 64, 64)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_png_is_what_other_readers_take(tmp_path):
    content = io.BytesIO()
    values = np.arange(5 * 7 * 3, dtype=np.uint16).reshape(5, 7, 3) * 613
    write_png(content, [values[:2], values[2:]], 5, 7, 16, lambda: None, None)
    data = torch.frombuffer(bytearray(content.getvalue()), dtype=torch.uint8)
    assert np.array_equal(decode_png(data, ImageReadMode.UNCHANGED).to(torch.int32).permute(1, 2, 0).numpy(), values)
    Image.open(content).verify()


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: picture_format("gif"), "unknown format 'gif': use one of png, png16, tiff"),
        (lambda: FORMATS["png"].check(90), "quality is 90, but .png files lose nothing"),
        (lambda: FORMATS["webp"].check(101), "from 1 to 100"),
        (lambda: FORMATS["webp"].check_size(64, 16384), "at most 16383 px a side, but the picture has 64 x 16384"),
    ],
)
def test_what_cannot_be_is_refused(check, message):
    with pytest.raises(UserError, match=message):
        check()
    FORMATS["webp"].check_size(16383, 16383)


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr("scale_dit.picture_files.compact.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install pillow-jxl-plugin"):
        FORMATS["jxl"].check(None)
