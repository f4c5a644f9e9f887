"""Pictures whose latents were kept are written anew in other ways; equal asks and lost latents change nothing."""

from __future__ import annotations

import io
import shutil
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from small_bases import noise
from small_runs import METHOD, PICTURES, SAMPLING, Stop

from scale_dit.errors import UserError
from scale_dit.generation import Loras
from scale_dit.generation.setup import Setup
from scale_dit.models.settings import BaseSettings
from scale_dit.picture_files import load_picture, picture_bits, read_provenance
from scale_dit.pipeline import ScaleDiTPipeline
from scale_dit.planning.memory import Memory


def test_kept_latents_are_decoded_again_into_another_format(make, tmp_path, whole):
    make("out", keep_latents=True)
    (file,) = make("out", stage="decode", format="webp", keep_latents=True)
    assert file.name == "00000_seed0.webp"
    assert torch.equal(load_picture(file), whole[0])
    provenance = read_provenance(file)
    assert provenance is not None
    assert provenance["prompt"] == PICTURES[0].prompt
    assert set(provenance["seconds"]) == {"decode"}
    assert provenance["decode"] == "whole", "what ran, not what was asked"


def test_decoding_reads_the_autoencoder_alone(small_folder, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(small_folder, folder)
    pipeline = ScaleDiTPipeline.from_pretrained(folder)
    for part in ("transformer", "text_encoder", "text_encoder_2"):
        for weights in (folder / part).glob("*.safetensors"):
            weights.unlink()
    setup = Setup(
        BaseSettings.of(str(folder)), METHOD, SAMPLING, Loras(), None, "auto", torch.device("cpu"), torch.float32,
        Memory(),
    )  # fmt: skip
    latents = noise(1, 16, 16, 32)
    found = torch.cat(list(setup.load_decoder().decode_bands(latents)), dim=1)
    assert torch.equal(found, torch.cat(list(pipeline.decode_bands(latents)), dim=1))


@pytest.fixture
def console() -> Console:
    """One that remembers what it was told."""
    return Console(file=io.StringIO(), width=200)


def said(console: Console) -> str:
    return console.file.getvalue()


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_other_bits_are_written_over_the_file_of_the_same_name(make, console, kind):
    """Both kinds of a suffix were one file that was taken for done."""
    (file,) = make("out", format=kind, keep_latents=True)
    before = file.read_bytes()
    options = {"stage": "decode", "format": f"{kind}16", "keep_latents": True, "console": console}
    with Stop("Decoder", 1, torch.OutOfMemoryError("full")), pytest.raises(UserError) as error:
        make("out", **options)
    assert f"stage=decode memory.decode=tiled resume={file.parent}" in str(error.value)
    assert file.read_bytes() == before, "until the new one is whole"
    assert make("out", **options) == [file]
    assert picture_bits(file) == 16
    assert read_provenance(file)["format"] == f"{kind}16"
    after = file.read_bytes()
    with Stop("Decoder", 1, AssertionError("an equal ask does nothing")):
        assert make("out", **options) == [file]
    assert file.read_bytes() == after
    assert f"Nothing is left to decode with format={kind}16. For other files give another format=" in said(console)
    make("out", stage="decode", format=kind, keep_latents=True)
    assert torch.equal(load_picture(file), load_picture(make("again", format=kind)[0]))


def test_another_quality_is_another_file(make):
    (file,) = make("out", format="webp", keep_latents=True)
    options = {"stage": "decode", "format": "webp", "keep_latents": True}
    sizes = [file.stat().st_size]
    for quality in (80, 30):
        make("out", quality=quality, **options)
        assert read_provenance(file)["quality"] == quality
        sizes.append(file.stat().st_size)
    assert sizes[0] > sizes[1] > sizes[2]
    with Stop("Decoder", 1, AssertionError("an equal ask does nothing")):
        make("out", quality=30, **options)


def test_tiles_do_not_replace_what_was_decoded_exactly(make, console):
    """They ask for little memory: the remedy of one picture would spoil its neighbours."""

    def decode(mode: str, tile: int = 128) -> tuple[str, int | None]:
        options = {"memory": Memory(decode=mode), "sampling": replace(SAMPLING, decode_tile=tile), "console": console}
        (file,) = make("out", stage="decode", keep_latents=True, **options)
        found = read_provenance(file)
        return found["decode"], found.get("decode_tile")

    (file,) = make("out", keep_latents=True)
    exact = file.read_bytes()
    with Stop("Decoder", 1, AssertionError("decoded")):
        decode("tiled")
    assert file.read_bytes() == exact
    assert "memory.decode=tiled decode_tile=128; what was decoded exactly is not decoded in tiles" in said(console)
    file.unlink()
    assert decode("tiled") == ("tiled", 128)
    assert decode("auto") == ("tiled", 128), "nothing is asked for"
    assert decode("tiled", 64) == ("tiled", 64)
    assert decode("whole") == ("whole", None)


def test_what_has_no_latents_any_more_stays(make, console, caplog):
    (file,) = make("out")
    before = file.read_bytes()
    assert make("out", stage="decode", format="png16", console=console) == []
    command = f"python src/generate.py overwrite=true format=png16 resume={file.parent}"
    assert "files of other than format=png16 stay as they are, of the pictures 0. Their latents were not kept" in said(
        console
    )
    assert command in said(console)
    assert make("out", resume=True, format="png16") == [file], "no step is made anew without a word"
    assert command in caplog.text
    assert file.read_bytes() == before
    assert make("out", stage="decode", format="webp", console=console) == []
    assert f"  python src/generate.py format=webp quality=null resume={file.parent}" in said(console)


def test_going_on_leaves_kept_pictures_as_they_were_written(make, caplog):
    (file,) = make("out", keep_latents=True)
    make("out", stage="decode", format="png16", keep_latents=True)
    assert make("out", resume=True, keep_latents=True) == [file]
    assert picture_bits(file) == 16
    assert f"decode them anew with: python src/generate.py stage=decode format=png resume={file.parent}" in caplog.text
