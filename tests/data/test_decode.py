"""Every mode and depth of picture file becomes the same RGB tensor."""

from __future__ import annotations

import io
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from scale_dit.data import decode
from scale_dit.data.decode import PictureError, TooLargeError, open_picture, to_rgb, upright_size, verify
from scale_dit.picture_files import register_formats, without_pillows_limit


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


class TestSize:
    @pytest.mark.parametrize("suffix", ["png", "tiff", "jpg", "webp", "gif", "jxl"])
    def test_pictures_above_pillows_limit_are_read_and_the_limit_stays(
        self, astronaut: Image.Image, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Pillow looks at the size when a file is opened, again when a TIFF is decoded, and when it is cut."""
        file = tmp_path / f"a.{suffix}"
        register_formats(file)
        astronaut.save(file)
        expected = to_rgb(open_picture(file), (8, 16, 72, 112))
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        with pytest.raises(Image.DecompressionBombError):
            Image.open(file)
        assert upright_size(open_picture(file.read_bytes())) == (160, 192)
        verify(open_picture(file))
        assert torch.equal(to_rgb(open_picture(file), (8, 16, 72, 112)), expected)
        assert Image.MAX_IMAGE_PIXELS == 100

    def test_larger_ones_are_refused_with_size_and_limit(
        self, astronaut: Image.Image, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert decode.LARGEST >= 16384**2
        monkeypatch.setattr(decode, "LARGEST", 160 * 192)
        reopened(astronaut, "PNG")
        monkeypatch.setattr(decode, "LARGEST", 160 * 192 - 1)
        with pytest.raises(TooLargeError, match=r"192 x 160 px, 30,720 in all, and 30,719 are the most") as found:
            reopened(astronaut, "PNG")
        assert found.value.remedy == "reduce or crop it"

    def test_pillows_limit_is_back_when_the_last_thread_leaves(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        inside, leave = threading.Barrier(2), threading.Event()

        def other() -> None:
            with without_pillows_limit():
                inside.wait()
                leave.wait()

        thread = threading.Thread(target=other)
        with without_pillows_limit():
            thread.start()
            inside.wait()
        assert Image.MAX_IMAGE_PIXELS is None
        leave.set()
        thread.join()
        assert Image.MAX_IMAGE_PIXELS == 100
