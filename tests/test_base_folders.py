"""A folder of weights and the base that is asked for must be of one kind."""

from __future__ import annotations

import json

import pytest

from scale_dit.errors import UserError
from scale_dit.models.settings import FLUX1, KLEIN_BASE, KLEIN_DISTILLED, BaseSettings

FLUX = {"transformer": ["diffusers", "FluxTransformer2DModel"]}
KLEIN = {"transformer": ["diffusers", "Flux2Transformer2DModel"]}


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
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=message):
        BaseSettings(name="mine", path=str(tmp_path), **settings).check_weights()


@pytest.mark.parametrize(
    ("index", "settings"),
    [
        (FLUX, {}),
        (FLUX, {"family": "elsewhere.MyFlux"}),
        (KLEIN, KLEIN_BASE),
        (KLEIN | {"is_distilled": True}, KLEIN_DISTILLED),
    ],
)
def test_its_own_kind_and_families_by_others_are_not(index, settings, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    BaseSettings(name="mine", path=str(tmp_path), **settings).check_weights()
