"""A folder of weights and the base that is asked for must be of one kind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from scale_dit.errors import UserError
from scale_dit.models.random_weights import base_settings, write_base
from scale_dit.models.settings import FLUX1, KLEIN_BASE, KLEIN_DISTILLED, BaseSettings
from scale_dit.models.shapes import shape_of
from scale_dit.models.weights_folder import transformer_config
from scale_dit.sampling import warn_of_unread_scales

FLUX = {"transformer": ["diffusers", "FluxTransformer2DModel"]}
KLEIN = {"transformer": ["diffusers", "Flux2Transformer2DModel"]}


def write_folder(folder: Path, index: dict, transformer: dict | None = None) -> str:
    (folder / "model_index.json").write_text(json.dumps(index))
    if transformer is not None:
        (folder / "transformer").mkdir()
        (folder / "transformer" / "config.json").write_text(json.dumps(transformer))
    return str(folder)


@pytest.mark.parametrize(
    ("index", "settings", "message"),
    [
        (KLEIN, {"family": FLUX1}, r"holds a Flux2Transformer2DModel, which base 'mine' is not: .*base=klein_4b"),
        (FLUX, KLEIN_BASE, r"holds a FluxTransformer2DModel, .*base=flux1_dev"),
        (KLEIN | {"is_distilled": True}, KLEIN_BASE, r"is_distilled=True.*base=klein_4b or klein_9b"),
        (KLEIN | {"is_distilled": False}, KLEIN_DISTILLED, r"is_distilled=False.*base=klein_base_4b or"),
    ],
)
def test_another_kind_is_refused_before_weights_are_read(index, settings, message, tmp_path):
    path = write_folder(tmp_path, index)
    with pytest.raises(UserError, match=message):
        BaseSettings(name="mine", path=path, **settings).check_weights()


@pytest.mark.parametrize(
    ("index", "settings"),
    [
        (FLUX, {}),
        (FLUX, {"family": "elsewhere.MyFlux"}),
        (FLUX, {"guidance_scale": 1.0, "steps": 4}),
        (KLEIN, KLEIN_BASE),
        (KLEIN | {"is_distilled": True}, KLEIN_DISTILLED),
    ],
)
def test_its_own_kind_and_families_by_others_are_not(index, settings, tmp_path):
    BaseSettings(name="mine", path=write_folder(tmp_path, index), **settings).check_weights()


@pytest.mark.parametrize(
    ("asked", "there", "message"),
    [
        ("klein_9b", "klein_4b", r"of 5 and 20 blocks of width 3072, which base 'klein_9b' is not: .*=klein_4b or"),
        ("klein_base_4b", "klein_base_9b", r"of 8 and 24 blocks of width 4096.*base=klein_9b or klein_base_9b"),
        ("flux1_dev", "flux1_schnell", r"guidance_embeds=False, .*use base=flux1_schnell$"),
        ("flux1_schnell", "flux1_dev", r"guidance_embeds=True, .*use base=flux1_dev$"),
    ],
)
def test_another_size_or_variant_is_refused_and_its_own_and_a_tiny_one_are_not(asked, there, message, tmp_path):
    transformer = shape_of(there, "full")["transformer"]
    path = write_folder(tmp_path, {"transformer": ["diffusers", transformer.kind]}, dict(transformer.sizes))
    base_settings(there, path=path).check_weights()
    base_settings(there, path=write_base(there, tmp_path / "tiny").path).check_weights()
    with pytest.raises(UserError, match=message):
        base_settings(asked, path=path).check_weights()


def test_the_hub_id_of_another_base_is_refused_without_asking_the_hub():
    with pytest.raises(UserError, match=r"FLUX.2-klein-4B is base=klein_4b, not base=klein_9b"):
        base_settings("klein_9b", path="black-forest-labs/FLUX.2-klein-4B").check_weights()


@pytest.mark.parametrize("name", ["flux1_dev", "flux1_schnell", "klein_4b", "klein_base_9b"])
def test_a_folder_without_settings_of_its_own_has_those_of_its_kind(name, tmp_path):
    transformer, settings = shape_of(name, "full")["transformer"], base_settings(name)
    index = {"transformer": ["diffusers", transformer.kind], "is_distilled": name == "klein_4b"}
    path = write_folder(tmp_path, index, dict(transformer.sizes))
    assert BaseSettings.of(path) == replace(settings, name=tmp_path.name, path=path)


def test_a_file_as_the_base_is_refused_with_the_option_for_it(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"img_in.weight": torch.zeros(2, 2)}, file)
    with pytest.raises(UserError, match=rf"is a file.*base.transformer_file={file}"):
        base_settings("klein_4b", path=str(file)).check_weights()


def test_a_transformer_of_another_family_or_depth_is_refused_before_it_is_loaded(tmp_path):
    flux, klein = (write_base(name, tmp_path / name) for name in ("flux1_dev", "klein_4b"))
    (own,) = Path(klein.path, "transformer").glob("*.safetensors")
    (other,) = Path(flux.path, "transformer").glob("*.safetensors")
    replace(klein, transformer_file=str(own)).check_weights()
    deep = {key: value for key, value in load_file(own).items() if not key.startswith("single_transformer_blocks.2.")}
    save_file(deep, tmp_path / "shallow.safetensors")
    for file, message in {
        other: r"input layer is of \[32, 64\]",
        tmp_path / "shallow.safetensors": "it has 2 single",
    }.items():
        with pytest.raises(UserError, match=rf"does not fit base 'klein_4b'.*{message}"):
            replace(klein, transformer_file=str(file)).check_weights()


def test_a_file_of_the_other_variant_or_beside_an_average_of_itself(tmp_path):
    dev, schnell = (write_base(name, tmp_path / name) for name in ("flux1_dev", "flux1_schnell"))
    files = [next(Path(base.path, "transformer").glob("*.safetensors")) for base in (dev, schnell)]
    for base, file, message in ((dev, files[1], "guidance is no input"), (schnell, files[0], "guidance is an input")):
        with pytest.raises(UserError, match=rf"does not fit base '{base.name}'.*{message}"):
            replace(base, transformer_file=str(file)).check_weights()
    own = load_file(files[0])
    twice = {f"{prefix}{key}": value.clone() for key, value in own.items() for prefix in ("model.", "ema.")}
    save_file(twice, tmp_path / "twice.safetensors")
    replace(dev, transformer_file=str(tmp_path / "twice.safetensors")).check_weights()


def test_a_file_for_a_family_by_others_is_not_looked_into(tmp_path):
    path = write_folder(tmp_path, {"transformer": ["mine", "MyTransformer"]}, {"_class_name": "MyTransformer"})
    save_file({"weight": torch.zeros(1)}, tmp_path / "mine.safetensors")
    base = BaseSettings(
        name="mine", path=path, family="elsewhere.My", transformer_file=str(tmp_path / "mine.safetensors")
    )
    base.check_weights()


def test_a_config_that_is_not_in_the_hubs_cache_is_said(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"transformer/config.json of some/model is neither.*base.path="):
        transformer_config("some/model")


def test_a_missing_folder_of_a_known_name_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="are neither in the folder"):
        base_settings("flux1_dev", path=str(tmp_path / "FLUX.1-schnell")).check_weights()


@pytest.mark.parametrize(
    ("name", "scale", "told"),
    [("flux1_schnell", 3.5, True), ("flux1_schnell", None, False), ("flux1_schnell", 1.0, False),
     ("klein_4b", 4, True), ("klein_base_9b", 2.0, False), ("flux1_dev", 5.0, False)],
)  # fmt: skip
def test_guidance_scales_that_nothing_reads_are_said(name, scale, told, caplog):
    transformer = shape_of(name, "full")["transformer"]
    warn_of_unread_scales(base_settings(name), {"_class_name": transformer.kind, **transformer.sizes}, scale)
    assert ("nothing reads guidance_scale=" in caplog.text) == told
