"""A picture file in place of the draft."""

from __future__ import annotations

import pytest
import torch
from PIL import Image, ImageCms
from rich.console import Console
from small_bases import SETTINGS, noise

from scale_dit.data import decode
from scale_dit.errors import UserError
from scale_dit.generation import DraftPhoto, Picture, Prompt, Sampling, collect_pictures, generate, run
from scale_dit.generation.photo import PhotoLatents
from scale_dit.generation.progress import GenerationProgress
from scale_dit.method import Method
from scale_dit.picture_files import load_picture, read_provenance, save_picture
from scale_dit.pipeline import ScaleDiTPipeline

PICTURE = Picture(0, "a large red circle on sand", "", 3, 128, 256)


def smooth(height: int, width: int, seed: int = 0) -> torch.Tensor:
    coarse = noise(1, 3, 4, 4, seed=seed) / 3 + 0.5
    return torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")[0].clamp(0, 1)


def photo(path, height=200, width=400, seed=0) -> DraftPhoto:
    save_picture(smooth(height, width, seed), path)
    return DraftPhoto(path)


@pytest.fixture(scope="module")
def pipeline(small_folder):
    return ScaleDiTPipeline.from_pretrained(small_folder)


def test_it_is_encoded_at_the_drafts_size_and_at_the_pictures_where_that_counts(pipeline, tmp_path):
    own = photo(tmp_path / "a.png")
    plain = own.latents(pipeline, Sampling().recipe(SETTINGS, Method(), 128, 256))
    assert isinstance(plain, PhotoLatents)
    assert plain.begin is None
    recipe = Sampling(start=0.5, scale=2).recipe(SETTINGS, Method(), 128, 256)
    found = own.latents(pipeline, recipe)
    assert found.draft.shape == (1, 16, 8, 16)
    assert found.begin is not None
    assert found.begin.shape == (1, 16, 16, 32)
    decoded = pipeline.decode(pipeline.base.encode_images(smooth(128, 256)[None]))
    assert (pipeline.decode(found.begin) - decoded).abs().mean() < 0.02, "but for reducing the photo"


def test_the_picture_depends_on_photo_and_strength_and_says_so(small_settings, tmp_path):
    def make(name: str, start: float, seed: int) -> torch.Tensor:
        own = photo(tmp_path / f"{seed}.png", seed=seed)
        sampling = Sampling(steps=3, start=start)
        (file,) = generate(
            [PICTURE], small_settings, Method(), sampling, tmp_path / name, photo=own, console=Console(quiet=True)
        )
        provenance = read_provenance(file)
        assert provenance is not None
        assert provenance["settings"]["draft"] == own.digest
        return load_picture(file).float()

    weak, strong, other = make("weak", 0.05, 0), make("strong", 0.9, 0), make("other", 0.05, 1)
    pipeline = ScaleDiTPipeline.from_pretrained(small_settings.path)
    kept = pipeline.decode(pipeline.base.encode_images(smooth(128, 256)[None]))[0] * 255
    assert (weak - kept).abs().mean() < (strong - kept).abs().mean()
    assert (weak - kept).abs().mean() < (other - kept).abs().mean()
    (tmp_path / "weak" / "pictures.jsonl").unlink()
    with pytest.raises(UserError, match="other settings"):
        make("weak", 0.05, 1)


def test_it_is_no_step_of_a_draft_to_the_progress_bar(small_settings, tmp_path, monkeypatch):
    bars = []

    class Kept(GenerationProgress):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments)
            bars.append(self)

    monkeypatch.setattr(run, "GenerationProgress", Kept)
    for own in (photo(tmp_path / "a.png"), None):
        options = {"photo": own, "console": Console(quiet=True)}
        generate([PICTURE], small_settings, Method(), Sampling(steps=1), tmp_path / f"{own is None}", **options)
    assert [list(bar.work[0]) for bar in bars] == [["refine", "decode"], ["draft", "refine", "decode"]]
    for bar in bars:
        assert bar.estimate.left() == 0, "all of the work was done by a step"


def test_sizes_are_of_its_aspect(tmp_path):
    own = photo(tmp_path / "a.png", 200, 300)
    (picture,) = collect_pictures([Prompt("a")], SETTINGS, Method(), Sampling(), photo=own)
    assert abs(picture.height / picture.width - 2 / 3) < 0.02
    assert picture.height % 16 == picture.width % 16 == 0
    assert abs(picture.height * picture.width / 512**2 - 1) < 0.1
    collect_pictures([Prompt("a")], SETTINGS, Method(), Sampling(), photo=own, height=128, width=192)
    with pytest.raises(UserError, match="use height=176 width=256, height=256 width=384, or crop it"):
        collect_pictures([Prompt("a")], SETTINGS, Method(), Sampling(), photo=own, height=256, width=256)


def test_orientation_profile_and_transparency_are_taken_care_of(pipeline, tmp_path):
    recipe = Sampling(scale=1).recipe(SETTINGS, Method(), 256, 128)

    def latents(path) -> torch.Tensor:
        return DraftPhoto(path).latents(pipeline, recipe).draft

    image = Image.fromarray((smooth(256, 128) * 255).byte().permute(1, 2, 0).numpy())
    image.save(tmp_path / "plain.png")
    exif = Image.Exif()
    exif[0x0112] = 8
    image.rotate(-90, expand=True).save(tmp_path / "turned.png", exif=exif)
    assert DraftPhoto(tmp_path / "turned.png").size == (256, 128)
    torch.testing.assert_close(latents(tmp_path / "turned.png"), latents(tmp_path / "plain.png"))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image.save(tmp_path / "profile.png", icc_profile=srgb)
    torch.testing.assert_close(latents(tmp_path / "profile.png"), latents(tmp_path / "plain.png"), rtol=0, atol=0.05)
    Image.new("RGBA", (128, 256), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("RGB", (128, 256), "white").save(tmp_path / "white.png")
    torch.testing.assert_close(latents(tmp_path / "clear.png"), latents(tmp_path / "white.png"))


@pytest.mark.parametrize("content", [None, b"", b"no picture", b"\x89PNG\r\n\x1a\n broken"])
def test_what_cannot_be_read_is_named(tmp_path, content):
    path = tmp_path / "photo.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"photo.png cannot be used \(.*give a picture file"):
        DraftPhoto(path)


def test_a_truncated_photo_is_named(pipeline, tmp_path):
    path = tmp_path / "photo.png"
    photo(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match="cannot be used"):
        DraftPhoto(path).latents(pipeline, Sampling().recipe(SETTINGS, Method(), 128, 256))


def test_photos_above_pillows_limit_are_taken_and_those_above_ours_refused(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    own = photo(tmp_path / "a.png")
    recipe = Sampling(scale=2).recipe(SETTINGS, Method(), 128, 256)
    assert own.draft_latents(pipeline, recipe).shape == (1, 16, 8, 16)
    monkeypatch.setattr(decode, "LARGEST", 79_999)
    with pytest.raises(UserError, match=r"a.png .*400 x 200 px, 80,000 in all, and 79,999 are.*: reduce or crop it"):
        DraftPhoto(tmp_path / "a.png")
