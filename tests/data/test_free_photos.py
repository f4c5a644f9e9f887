"""The step that takes free photographs out of Debian packages, on packages built here by the same tools."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from scale_dit.data.free_photos import FreePhoto, fetch, main, read_manifest
from scale_dit.data.photos import open_photos
from scale_dit.errors import UserError

needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")


def test_manifest_states_source_licence_and_author_of_each_photograph() -> None:
    photos = read_manifest()
    assert len(photos) >= 20
    assert len({photo.sha256 for photo in photos}) == len({photo.file_name for photo in photos}) == len(photos)
    free = {"CC0-1.0", "CC-BY-4.0", "CC-BY-SA-3.0", "CC-BY-SA-4.0", "GPL-2+"}
    for photo in photos:
        assert photo.licence in free
        assert photo.author
        assert len(photo.caption.split()) > 3
        assert photo.split in ("train", "test")
        assert len(bytes.fromhex(photo.sha256)) == 32
        assert min(photo.width, photo.height) >= 1000


def pixels(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def debs(tmp_path: Path) -> Path:
    root = tmp_path / "package"
    for path, data in {
        "DEBIAN/control": b"Package: walls\nVersion: 1.0\nArchitecture: all\nMaintainer: A <a@b.c>\nDescription: x\n",
        "usr/share/doc/walls/copyright": b"License: CC0-1.0\n",
        "usr/share/backgrounds/red.png": pixels("red"),
        "usr/share/backgrounds/blue.png": pixels("blue"),
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    (tmp_path / "debs").mkdir()
    subprocess.run(["dpkg-deb", "-b", str(root), str(tmp_path / "debs" / "walls_1.0_all.deb")], check=True)
    return tmp_path / "debs"


def photo(colour: str, split: str = "train") -> FreePhoto:
    data = pixels(colour)
    path = f"usr/share/backgrounds/{colour}.png"
    sha256 = hashlib.sha256(data).hexdigest()
    return FreePhoto("walls", path, sha256, len(data), 64, 48, "CC0-1.0", "A", f"all {colour}", split)


@needs_dpkg
def test_photographs_come_with_captions_and_licences(tmp_path: Path, debs: Path) -> None:
    output = tmp_path / "photos"
    assert fetch(output, [photo("red"), photo("blue", "test")], debs) == []
    source = open_photos(output / "train")
    assert list(zip(source.names, source.captions, strict=True)) == [("red.png", "all red")]
    assert open_photos(output / "test").captions == ("all blue",)
    assert "CC0" in (output / "licences" / "walls.txt").read_text()
    shutil.rmtree(debs)
    assert fetch(output, [photo("red"), photo("blue", "test")], debs) == []


@needs_dpkg
def test_what_is_missing_or_differs_is_named(tmp_path: Path, debs: Path) -> None:
    other = dataclasses.replace(photo("blue"), sha256="0" * 64)
    elsewhere = dataclasses.replace(photo("green"), package="other")
    problems = fetch(tmp_path / "photos", [photo("red"), other, photo("green"), elsewhere], debs)
    assert problems == [
        "blue.png: this version of walls holds another picture (sha256 differs)",
        "green.png: this version of walls does not hold usr/share/backgrounds/green.png",
        f"green.png: no other_*.deb in {debs}",
    ]
    assert [file.name for file in (tmp_path / "photos" / "train").glob("*.png")] == ["red.png"]


@needs_dpkg
def test_a_damaged_package_is_an_error(tmp_path: Path, debs: Path) -> None:
    deb = debs / "walls_1.0_all.deb"
    deb.write_bytes(deb.read_bytes()[:200])
    with pytest.raises(UserError, match=r"red.png: dpkg-deb -x failed .*download the package again"):
        fetch(tmp_path / "photos", [photo("red")], debs)


def test_machine_without_debian_tools(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["--output", str(tmp_path / "photos")]) == 2
    assert "apt-get and dpkg-deb not found" in capsys.readouterr().err
    assert not (tmp_path / "photos").exists()
