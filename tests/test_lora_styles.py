"""A pipeline's LoRAs by name: styles act beside ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from lora_helpers import fused, linear_layers, random_lora
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_bases import add_random_lora
from test_families import seeded

from scale_dit.errors import UserError
from scale_dit.lora import ADAPTER, LoraSettings, active_adapters, lora_state, save_lora
from scale_dit.lora_exchange import StyleLora, read_foreign_lora, style_loras
from scale_dit.models.random_weights import write_base
from scale_dit.pipeline import ScaleDiTPipeline


@pytest.fixture(scope="module")
def klein_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exchange") / "base"
    write_base("klein_base_9b", folder, dtype=torch.float32)
    return folder


@pytest.fixture
def pipeline(klein_folder) -> ScaleDiTPipeline:
    return ScaleDiTPipeline.from_pretrained(klein_folder)


@pytest.fixture
def style_file(pipeline, tmp_path) -> Path:
    """A style that touches every layer."""
    tensors = random_lora(pipeline.transformer, linear_layers(pipeline.transformer))
    path = tmp_path / "water.colour.safetensors"
    save_file({f"transformer.{key}": value for key, value in tensors.items()}, path)
    return path


@pytest.fixture
def own_file(klein_folder, tmp_path) -> Path:
    base = ScaleDiTPipeline.from_pretrained(klein_folder).base
    add_random_lora(base)
    return save_lora(base.transformer, tmp_path / "own", LoraSettings(4, 4), {"base": "klein_base_9b"})


@pytest.mark.parametrize("own_first", [True, False])
@torch.no_grad()
def test_a_style_acts_on_all_tokens_and_ours_on_the_drafts(pipeline, klein_folder, style_file, own_file, own_first):
    style = StyleLora(str(style_file), 0.5)
    assert style.adapter == "water_colour"
    for own in (own_first, not own_first):
        if own:
            pipeline.load_lora_weights(own_file)
        else:
            pipeline.load_lora_weights(style_file, style.adapter, weight=style.weight)
    assert sorted(pipeline.get_active_adapters()) == sorted([ADAPTER, "water_colour"])
    assert pipeline.base.image_adapters == ("water_colour",)
    drawn = pipeline.make_drafts(["sand"], 128, 128, 2.0, 2, 3.0, seeded(3))[0]
    stock = DiffusionPipeline.from_pretrained(klein_folder)
    fused(stock.transformer, read_foreign_lora(style_file, pipeline.base.authors_layers), 0.5)
    reference = ScaleDiTPipeline(**stock.components)
    reference.configure(pipeline.settings)
    torch.testing.assert_close(
        drawn, reference.make_drafts(["sand"], 128, 128, 2.0, 2, 3.0, seeded(3))[0], rtol=0, atol=1e-3
    )
    reference.load_lora_weights(own_file)
    options = {"height": 128, "width": 128, "scale": 2, "num_inference_steps": 1, "draft_steps": 1, "generator": None}
    refined = [
        each("sand", **options | {"generator": seeded(1)[0]}, output_type="latent").images
        for each in (pipeline, reference)
    ]
    torch.testing.assert_close(*refined, rtol=0, atol=1e-3)


def test_adapters_are_weighed_chosen_and_removed(pipeline, style_file, own_file):
    plain = dict(pipeline.transformer.named_modules()).keys()
    pipeline.load_lora_weights(own_file)
    pipeline.load_lora_weights(style_file, "one")
    pipeline.load_lora_weights(style_file, "two", weight=0.25)
    assert pipeline.base.guidance_adapters == (ADAPTER, "one", "two")
    assert pipeline.adapter_weights == {ADAPTER: 1.0, "one": 1.0, "two": 0.25}
    pipeline.set_adapters([ADAPTER, "two"], [1.0, 0.75])
    assert pipeline.get_active_adapters() == [ADAPTER, "two"]
    assert pipeline.transformer.x_embedder.scaling["two"] == 0.75
    with pytest.raises(UserError, match="no LoRA is named 'three'"):
        pipeline.set_adapters("three")
    with pytest.raises(UserError, match="2 weights were given for 1 adapters"):
        pipeline.set_adapters("one", [1.0, 2.0])
    pipeline.load_lora_weights(own_file)  # the other one makes room, styles stay
    assert pipeline.get_active_adapters() == ["two", ADAPTER]
    pipeline.delete_adapters("two")
    assert pipeline.get_active_adapters() == [ADAPTER]
    pipeline.unload_lora_weights()
    assert pipeline.base.guidance_adapters == pipeline.base.image_adapters == ()
    assert dict(pipeline.transformer.named_modules()).keys() == plain


def test_a_guidance_lora_by_others_needs_its_base(pipeline, style_file, caplog):
    with pytest.raises(UserError, match=r"lora\.base=klein_base_9b.*style_loras"):
        pipeline.load_lora_weights(style_file)
    with pytest.raises(UserError, match="trained on base 'klein_4b'"):
        pipeline.load_lora_weights(style_file, base="klein_4b")
    pipeline.load_lora_weights(style_file, base="klein_base_9b")
    assert "does not say what it was trained for" in caplog.text
    assert (pipeline.base.guidance_adapters, pipeline.base.image_adapters) == ((ADAPTER,), ())


def test_a_replacement_that_does_not_fit_leaves_what_was_there(pipeline, own_file, tmp_path):
    pipeline.load_lora_weights(own_file)
    before = lora_state(pipeline.transformer)
    lacking, foreign = tmp_path / "lacking.safetensors", tmp_path / "foreign.safetensors"
    with safe_open(own_file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(own_file)
    tensors.popitem()
    save_file(tensors, lacking, metadata)
    save_file({"transformer.x_embedder.lora_A.weight": torch.zeros(2, 64)}, foreign)
    for path, options in ((lacking, {}), (foreign, {"base": "klein_base_9b"})):
        with pytest.raises(UserError, match="does not fit"):
            pipeline.load_lora_weights(path, **options)
        assert pipeline.get_active_adapters() == [ADAPTER]
        assert pipeline.lora_path == str(own_file)
        after = lora_state(pipeline.transformer)
        assert after.keys() == before.keys()
        assert all(torch.equal(after[key], before[key]) for key in after)
        assert set(pipeline.transformer.peft_config) == {ADAPTER}


def test_a_name_for_our_own_is_said_to_be_ignored(pipeline, own_file, caplog):
    pipeline.load_lora_weights(own_file, "mine")
    assert f"its name is {ADAPTER!r}, not 'mine'" in caplog.text


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"transformer.transformer_blocks.7.attn.to_q.lora_A.weight": (2, 32)},
            r"1 are unexpected \(transformer_blocks.7.*lora_A",
        ),
        (
            {"transformer.x_embedder.lora_A.weight": (2, 64)},
            r"does not fit .* \[2, 64\] instead of \[2, 128\]",
        ),
        ({"transformer.x_embedder.lora_A.weight": (2, 128)}, r"1 are missing \(x_embedder.lora_B.weight\)"),
        ({"transformer.x_embedder.lora_magnitude_vector": (32,)}, "no LoRA matrices"),
        (
            {
                "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": (2, 32),
                "lora_unet_double_blocks_0_img_attn_proj.lora_up.weight": (32, 2),
                "lora_unet_double_blocks_0_img_attn_proj.dora_scale": (32, 1),
            },
            "dora_scale: only plain LoRA",
        ),
        (
            {"transformer.x_embedder.lora_A.weight": (2, 128), "other.lora_A.weight": (2, 8)},
            "unknown names, such as other",
        ),
        ({"unet.down.lora_A.weight": (2, 32)}, "not one of this base's family"),
        ({"some_weight": (2, 32)}, "LoRA file"),
    ],
)
def test_what_does_not_fit_is_said(pipeline, tmp_path, keys, message):
    path = tmp_path / "odd.safetensors"
    save_file({key: torch.zeros(shape) for key, shape in keys.items()}, path)
    with pytest.raises(UserError, match=message):
        pipeline.load_lora_weights(path, "odd")
    assert not pipeline.scopes
    assert not getattr(pipeline.transformer, "peft_config", {})


@pytest.mark.parametrize("name", [ADAPTER, "update", "half"])
def test_a_name_that_cannot_be_is_refused(name):
    with pytest.raises(UserError, match="another name"):
        StyleLora("some.safetensors", name=name)
    with pytest.raises(UserError, match="another name"):
        StyleLora(f"{name}.safetensors")


def test_a_name_may_be_a_number():
    (style,) = style_loras([{"path": "some.safetensors", "name": 5}])
    assert style.adapter == "5"


def test_active_adapters_are_put_back(pipeline, style_file):
    pipeline.load_lora_weights(style_file, "one")
    layer = pipeline.transformer.x_embedder
    before = list(layer._active_adapter)
    with active_adapters(pipeline.transformer, ()):
        assert layer._active_adapter == []
    assert list(layer._active_adapter) == before
