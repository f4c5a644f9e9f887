"""What the switches come to on the embedded base and on FLUX.1."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from scale_dit.errors import UserError
from scale_dit.grid import Grid
from scale_dit.method import Method
from scale_dit.models import load_family
from scale_dit.models.flux1 import Flux1
from scale_dit.models.settings import BaseSettings

FLUX = BaseSettings(name="flux1_dev")
TINY = BaseSettings(
    name="tiny", cell=2, window=4, native=256, text_length=64, shift=1.0, guidance_scale=3.0, distilled=False
)
OFFICIAL = Method()
DISJOINT = Method(halo_cells=0)
PAPER = Method(halo_cells=0, scope="global", guidance_tokens=256)


@pytest.mark.parametrize(
    ("base", "side", "image", "draft", "window", "halo", "windows"),
    [(FLUX, 4096, 256, 64, 16, 8, 256), (TINY, 1024, 64, 16, 4, 2, 256)],
)
def test_the_proportions_are_the_same_on_every_base(base, side, image, draft, window, halo, windows):
    layout = OFFICIAL.plan(base, side, side).layout
    assert layout.image == Grid(image, image, base.cell)
    assert layout.guidance == Grid(draft, draft, base.cell)
    assert (layout.text, layout.window, layout.halo) == (base.text_length, window, halo)
    assert (layout.scope, layout.order, layout.shift) == ("aligned", "hilbert", 0)
    assert len(layout.windows) == windows
    middle = layout.windows[windows // 2 + 8]
    assert middle.queries.tokens == window**2
    assert middle.keys.tokens == (window + 2 * halo) ** 2
    assert middle.guidance.tokens == (2 * base.cell) ** 2


def test_presets_on_flux_at_4k():
    disjoint, paper = (method.plan(FLUX, 4096, 4096).layout for method in (DISJOINT, PAPER))
    assert {window.keys.tokens for window in disjoint.windows} == {256}
    assert {window.guidance.tokens for window in disjoint.windows} == {256}
    assert paper.guidance == Grid(16, 16, 8)
    assert {window.guidance.tokens for window in paper.windows} == {256}
    pairs = OFFICIAL.plan(FLUX, 4096, 4096).layout.attention_pairs()
    assert pairs.image_to_image / 65536 + pairs.image_to_guidance / 65536 == pytest.approx(1225, abs=60)


def test_dense_is_one_window_and_reads_no_draft():
    plan = Method(windowed=False, guidance=False).plan(FLUX, 1024, 1536)
    assert plan.layout.is_dense
    assert plan.layout.guidance is None
    assert plan.guidance_ids.shape == (0, 3)
    with pytest.raises(ValueError, match="no guidance"):
        _ = plan.guidance_layout


@pytest.mark.parametrize("order", ["raster", "window", "hilbert"])
def test_ids_follow_their_tokens(order):
    plan = Method(order=order, anchors="centred").plan(TINY, 768, 1024)
    places = plan.layout.image_order
    assert torch.equal(plan.image_ids[:, 1], (places // 64).float())
    assert torch.equal(plan.image_ids[:, 2], (places % 64).float())
    draft = plan.layout.guidance_order
    assert torch.equal(plan.guidance_ids[:, 1], draft // 16 * 4.0 + 1.5)
    assert torch.equal(plan.guidance_ids[:, 2], draft % 16 * 4.0 + 1.5)


def test_shifted_windows_alternate_by_half_a_window():
    plan = replace(DISJOINT, shift_windows=True).plan(FLUX, 2048, 2048)
    even, odd = plan.layouts
    assert (even.shift, odd.shift) == (0, 8)
    assert torch.equal(even.image_order, odd.image_order), "tokens are permuted once, not in every block"
    for dense in (Method(), Method(windowed=False, shift_windows=True)):
        layouts = dense.plan(FLUX, 2048, 2048).layouts
        assert layouts[0] is layouts[1]


def test_guidance_pass_reads_neighbours_or_everything():
    near, far = (Method(guidance_reach=reach).plan(TINY, 1024, 1024).guidance_layout for reach in ("adjacent", "all"))
    assert near.text == far.text == 0
    assert (near.window, near.halo) == (2, 2)
    assert far.is_dense


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        ({}, (1000, 1024), "Height 1000 px is not a positive multiple of .* 16 px: use 992 or 1008"),
        ({}, (1024, 0), "Width 0 px"),
        ({"window": 0}, (1024, 1024), "Window 0 must be a multiple of the cell"),
        ({"window": 3}, (1024, 1024), "use 2 or 4"),
        ({"window": 66}, (1024, 1024), "Window 66 is larger than the picture's grid of 64 x 64 tokens: use at most 64"),
        ({"order": "spiral"}, (1024, 1024), "Unknown order 'spiral': use one of hilbert, raster, window"),
        ({"anchors": "left"}, (1024, 1024), "Unknown anchors 'left': use one of centred, none, scaled"),
        ({"scope": "near"}, (1024, 1024), "Unknown guidance scope 'near': use one of aligned, global"),
        ({"guidance_reach": "far"}, (1024, 1024), "Unknown guidance reach 'far': use one of adjacent, all"),
        ({"scale": 0.5}, (1024, 1024), "Scale is 0.5"),
        ({"guidance_tokens": 0}, (1024, 1024), "guidance limit is 0"),
        ({"window": 2, "shift_windows": True}, (1024, 1024), "cannot be shifted by half.*use window.size=4"),
    ],
)
def test_what_cannot_be_is_refused_with_a_remedy(changes, size, message):
    with pytest.raises(UserError, match=message):
        Method(**changes).plan(TINY, *size)


def test_ntk_must_be_positive():
    with pytest.raises(UserError, match="NTK factor is 0"):
        Method(ntk=0)


def test_summary_is_what_a_lora_depends_on():
    assert Method(order="raster").summary == Method(order="hilbert").summary
    assert Method(scale=2).summary != Method().summary
    assert all(isinstance(value, int | float | str | None) for value in Method().summary.values())


def test_settings_travel_with_the_weights(tmp_path):
    TINY.save(tmp_path)
    assert BaseSettings.of(str(tmp_path)) == replace(TINY, path=str(tmp_path))
    other = tmp_path / "plain-flux"
    other.mkdir()
    (other / "model_index.json").write_text('{"transformer": ["diffusers", "FluxTransformer2DModel"]}')
    assert BaseSettings.of(str(other)) == BaseSettings(name="plain-flux", path=str(other))


def test_missing_weights_and_unknown_families_are_told_before_anything_else(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"base 'flux1_dev'.*base.path=/path/to/weights.*base=tiny"):
        replace(FLUX, path=str(tmp_path / "nowhere")).check_weights()
    with pytest.raises(UserError, match="base=tiny"):
        replace(FLUX, path="black-forest-labs/FLUX.1-dev").check_weights()
    assert load_family(FLUX) is Flux1
    for family in ("scale_dit.models.flux9.Flux9", "scale_dit.models.flux1.Flux9", "Flux1"):
        with pytest.raises(UserError, match="cannot be imported"):
            load_family(replace(FLUX, family=family))
