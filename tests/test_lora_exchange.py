"""LoRA files of others come in, ours go out, and styles act beside ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, Flux2KleinPipeline, FluxPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_bases import SETTINGS, add_random_lora, drive, drive_klein, flux, klein, noise, random_text
from test_families import seeded
from torch import Tensor, nn

from scale_dit.errors import UserError
from scale_dit.lora import ADAPTER, DIFFUSERS_CONFIG, LoraSettings, active_adapters, lora_state, save_lora
from scale_dit.lora_exchange import StyleLora, add_foreign_lora, read_foreign_lora, set_weight
from scale_dit.lora_targets import target_modules
from scale_dit.method import Method
from scale_dit.models.random_weights import write_base
from scale_dit.pipeline import ScaleDiTPipeline

FAMILIES = {"flux1": (flux, drive, FluxPipeline), "flux2": (klein, drive_klein, Flux2KleinPipeline)}
RANKS = (2, 3)


def random_lora(transformer: nn.Module, modules: list[str]) -> dict[str, Tensor]:
    """Matrices for some layers by peft's names, of two ranks."""
    tensors: dict[str, Tensor] = {}
    for index, name in enumerate(modules):
        layer, rank = transformer.get_submodule(name), RANKS[index % 2]
        tensors[f"{name}.lora_A.weight"] = 0.3 * noise(rank, layer.in_features, seed=2 * index)
        tensors[f"{name}.lora_B.weight"] = 0.3 * noise(layer.out_features, rank, seed=2 * index + 1)
    return tensors


def linear_layers(transformer: nn.Module) -> list[str]:
    return [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]


def fused(transformer: nn.Module, tensors: dict[str, Tensor], weight: float = 1.0) -> None:
    """The same update in the weights themselves."""
    for key in [key for key in tensors if ".lora_A." in key]:
        layer = transformer.get_submodule(key.rsplit(".lora_", 1)[0])
        layer.weight.data += weight * tensors[key.replace("lora_A", "lora_B")] @ tensors[key]


def velocity(base, seed: int = 0) -> Tensor:
    """What both passes make of a draft and noise."""
    width = base.transformer.config.in_channels
    plan = Method(scale=2).plan(SETTINGS, 192, 160)
    text = random_text(1, base.transformer, seed=seed)
    stored = base.guidance_pass(noise(1, 30, width, seed=4), text.pooled, plan, 1)
    return base.image_pass(noise(1, 120, width), text, torch.tensor([0.3]), plan, stored, 1)


FORMS = {
    "diffusers": lambda tensors: ({f"transformer.{key}": value for key, value in tensors.items()}, None),
    "peft": lambda tensors: ({f"base_model.model.{key}": value for key, value in tensors.items()}, None),
    "named": lambda tensors: (
        {f"base_model.model.{key.replace('.weight', '.default.weight')}": value for key, value in tensors.items()}, None
    ),
    "bare": lambda tensors: (tensors, None),
    "trainer": lambda tensors: ({f"diffusion_model.{key}": value for key, value in tensors.items()}, None),
    "down": lambda tensors: (
        {
            f"transformer.{key}".replace("lora_A", "lora_down").replace("lora_B", "lora_up"): value
            for key, value in tensors.items()
        },
        None,
    ),
    "alphas": lambda tensors: (
        {
            f"transformer.{key}": value / 2 if "lora_B" in key else value for key, value in tensors.items()
        }
        | {
            f"transformer.{key.split('.lora_')[0]}.alpha": torch.tensor(2.0 * len(value))
            for key, value in tensors.items() if "lora_A" in key
        },
        None,
    ),
    "regex": lambda tensors: (
        {f"transformer.{key}": value * RANKS[0] / 6 if "lora_B" in key else value for key, value in tensors.items()},
        {"transformer.r": RANKS[0], "transformer.lora_alpha": 6, "transformer.target_modules": ".*attn\\.to_[qkv]"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_file_by_others_does_what_its_matrices_say(family, form, tmp_path):
    make, drives, stock = FAMILIES[family]
    base, reference = drives(make()), drives(make())
    modules = linear_layers(base.transformer)
    # One alpha and one rank stand for all layers in diffusers' metadata.
    modules = modules[::2] if form == "regex" else modules
    truth = random_lora(base.transformer, modules)
    if form == "regex":
        truth = {key: value[: RANKS[0]] if "lora_A" in key else value[:, : RANKS[0]] for key, value in truth.items()}
    written, config = FORMS[form](truth)
    metadata = {DIFFUSERS_CONFIG: json.dumps(config)} if config else None
    save_file({key: value.contiguous() for key, value in written.items()}, tmp_path / "file.safetensors", metadata)
    tensors = read_foreign_lora(tmp_path / "file.safetensors", stock)
    assert add_foreign_lora(base.transformer, tensors, "the file", "theirs") == len(modules)
    base.guidance_adapters = base.image_adapters = ("theirs",)
    set_weight(base.transformer, "theirs", 0.7)
    fused(reference.transformer, truth, 0.7)
    torch.testing.assert_close(velocity(base), velocity(reference), rtol=0, atol=1e-4)
    base.guidance_adapters = base.image_adapters = ()
    torch.testing.assert_close(velocity(base), velocity(drives(make())), rtol=0, atol=1e-6)


KOHYA = {
    "flux1": {
        "lora_unet_double_blocks_0_img_attn_qkv": ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k",
                                                   "transformer_blocks.0.attn.to_v"],
        "lora_unet_double_blocks_1_img_mlp_0": ["transformer_blocks.1.ff.net.0.proj"],
        "lora_unet_single_blocks_0_linear2": ["single_transformer_blocks.0.proj_out"],
    },
    "flux2": {
        "lora_unet_double_blocks_0_img_attn_qkv": ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k",
                                                   "transformer_blocks.0.attn.to_v"],
        "lora_unet_double_blocks_1_img_mlp_0": ["transformer_blocks.1.ff.linear_in"],
        "lora_unet_single_blocks_0_linear2": ["single_transformer_blocks.0.attn.to_out"],
    },
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_kohyas_names_come_to_the_same_update(family, tmp_path):
    make, _, stock = FAMILIES[family]
    transformer = make()
    written, wanted = {}, {}
    for index, (name, modules) in enumerate(KOHYA[family].items()):
        layers = [transformer.get_submodule(module) for module in modules]
        down = noise(4, layers[0].in_features, seed=index)
        up = noise(sum(layer.out_features for layer in layers), 4, seed=9 + index)
        written |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(2.0)}
        parts = up.split([layer.out_features for layer in layers])
        wanted |= {module: 2 / 4 * part @ down for module, part in zip(modules, parts, strict=True)}
    save_file(written, tmp_path / "kohya.safetensors")
    tensors = read_foreign_lora(tmp_path / "kohya.safetensors", stock)
    assert {key.rsplit(".lora_", 1)[0] for key in tensors} == set(wanted)
    for module, update in wanted.items():
        found = tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
        torch.testing.assert_close(found, update)
    assert add_foreign_lora(transformer, tensors, "the file", "theirs") == len(wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_alphas_count_beside_a_text_encoders_tensors(family, tmp_path, caplog):
    make, _, stock = FAMILIES[family]
    truth = random_lora(make(), ["transformer_blocks.0.attn.to_q"])
    written, _ = FORMS["alphas"](truth)
    encoder = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    written |= {f"{encoder}.lora_A.weight": noise(2, 8), f"{encoder}.lora_B.weight": noise(8, 2)}
    save_file(written, tmp_path / "both.safetensors")
    found = read_foreign_lora(tmp_path / "both.safetensors", stock)
    assert found.keys() == truth.keys()
    for key, value in truth.items():
        torch.testing.assert_close(found[key], value)
    assert "2 tensors for text encoders are left out" in caplog.text


@pytest.mark.parametrize("name", ["flux1_dev", "klein_base_9b"])
@torch.no_grad()
def test_ours_load_in_the_stock_pipelines(name, tmp_path):
    settings = write_base(name, tmp_path / "base", dtype=torch.float32)
    pipeline = ScaleDiTPipeline.from_pretrained(tmp_path / "base")
    add_random_lora(pipeline.base, scope="all")
    save_lora(pipeline.transformer, tmp_path / "lora", LoraSettings(4, 4, "all"), {"base": settings.name})
    stock = DiffusionPipeline.from_pretrained(tmp_path / "base")
    stock.load_lora_weights(tmp_path / "lora")
    layers = [key for key, module in stock.transformer.named_modules() if hasattr(module, "lora_A")]
    assert sorted(layers) == sorted(target_modules(pipeline.transformer))
    options = {"guidance_scale": 3.0, "num_inference_steps": 2, "output_type": "latent", "max_sequence_length": 48}
    wanted = stock(prompt="sand", height=64, width=64, generator=seeded(3)[0], **options)[0]
    drafts, _ = pipeline.make_drafts(["sand"], 128, 128, 2.0, 2, 3.0, seeded(3))
    if name == "flux1_dev":
        wanted = stock._unpack_latents(wanted, 64, 64, stock.vae_scale_factor)
    else:
        drafts = pipeline.base.denormalise(drafts)
    torch.testing.assert_close(drafts, wanted, rtol=0, atol=1e-4)


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
    fused(stock.transformer, read_foreign_lora(style_file, type(stock)), 0.5)
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
        ({"transformer.transformer_blocks.7.attn.to_q.lora_A.weight": (2, 32)}, "layers that the transformer lacks"),
        ({"transformer.x_embedder.lora_A.weight": (2, 64)}, "does not fit this base"),
        ({"transformer.x_embedder.lora_magnitude_vector": (32,)}, "no LoRA matrices"),
        (
            {
                "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": (2, 32),
                "lora_unet_double_blocks_0_img_attn_proj.lora_up.weight": (32, 2),
                "lora_unet_double_blocks_0_img_attn_proj.dora_scale": (32, 1),
            },
            "dora_scale: only plain LoRA",
        ),
        ({"transformer.x_embedder.lora_A.weight": (2, 128), "other.lora_A.weight": (2, 8)}, "unknown names"),
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


def test_active_adapters_are_put_back(pipeline, style_file):
    pipeline.load_lora_weights(style_file, "one")
    layer = pipeline.transformer.x_embedder
    before = list(layer._active_adapter)
    with active_adapters(pipeline.transformer, ()):
        assert layer._active_adapter == []
    assert list(layer._active_adapter) == before
