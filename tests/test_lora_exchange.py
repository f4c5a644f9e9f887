"""LoRA files of others come in, under the names of any trainer, and ours go out."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers
from lora_helpers import RANKS, fused, linear_layers, random_lora, velocity
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from small_bases import add_random_lora, drive, drive_klein, flux, klein, noise
from test_families import seeded
from torch import Tensor

from scale_dit.errors import UserError
from scale_dit.lora import DIFFUSERS_CONFIG, LoraSettings, file_digest, save_lora
from scale_dit.lora_exchange import add_foreign_lora, read_foreign_lora, set_weight
from scale_dit.lora_fit import layer_names
from scale_dit.lora_targets import target_modules
from scale_dit.models.flux1 import Flux1
from scale_dit.models.flux2 import Flux2Klein
from scale_dit.models.random_weights import write_base
from scale_dit.pipeline import ScaleDiTPipeline

FAMILIES = {"flux1": (flux, drive, Flux1.authors_layers), "flux2": (klein, drive_klein, Flux2Klein.authors_layers)}


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
    make, drives, layers = FAMILIES[family]
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
    tensors = read_foreign_lora(tmp_path / "file.safetensors", layers)
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
    make, _, layers = FAMILIES[family]
    transformer = make()
    written, wanted = {}, {}
    for index, (name, modules) in enumerate(KOHYA[family].items()):
        parts_of = [transformer.get_submodule(module) for module in modules]
        down = noise(4, parts_of[0].in_features, seed=index)
        up = noise(sum(layer.out_features for layer in parts_of), 4, seed=9 + index)
        written |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(2.0)}
        parts = up.split([layer.out_features for layer in parts_of])
        wanted |= {module: 2 / 4 * part @ down for module, part in zip(modules, parts, strict=True)}
    save_file(written, tmp_path / "kohya.safetensors")
    tensors = read_foreign_lora(tmp_path / "kohya.safetensors", layers)
    assert {key.rsplit(".lora_", 1)[0] for key in tensors} == set(wanted)
    for module, update in wanted.items():
        torch.testing.assert_close(update_of(tensors, module), update)
    assert add_foreign_lora(transformer, tensors, "the file", "theirs") == len(wanted)


def update_of(tensors: dict[str, Tensor], module: str) -> Tensor:
    return tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]


SPELLINGS = {
    "kohya": "lora_unet_{0}.lora_down.weight",
    "comfy": "diffusion_model.{1}.lora_down.weight",
    "trainer": "diffusion_model.{1}.lora_A.weight",
    "peft": "base_model.model.{1}.lora_A.default.weight",
    "bare": "{1}.lora_A.weight",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_of_the_authors_is_known_by_each_spelling(family, spelling, tmp_path):
    make, _, layers = FAMILIES[family]
    transformer = make()
    written, wanted, updates = {}, {}, {}
    for index, (authors, modules) in enumerate(layers.items()):
        if ".processor." in authors or "guidance_in" in authors:  # XLabs' own, and what undistilled bases lack
            continue
        block, parts_of = authors.format(1), [transformer.get_submodule(each.format(1)) for each in modules]
        down = noise(3, parts_of[0].in_features, seed=index)
        up = noise(sum(layer.out_features for layer in parts_of), 3, seed=99 + index)
        name = SPELLINGS[spelling].format(block.replace(".", "_"), block)
        written |= {name: down, name.replace("lora_A", "lora_B").replace("lora_down", "lora_up"): up}
        written[name.split(".lora_")[0] + ".alpha"] = torch.tensor(6.0)
        updates[f"{block}.weight"] = 2 * up @ down
        rows = up.split([layer.out_features for layer in parts_of])
        wanted |= {each.format(1): 2 * part @ down for each, part in zip(modules, rows, strict=True)}
    shift, scale = wanted["norm_out.linear"].chunk(2)
    wanted["norm_out.linear"] = torch.cat([scale, shift])
    save_file(written, tmp_path / "file.safetensors")
    tensors = read_foreign_lora(tmp_path / "file.safetensors", layers)
    assert set(layer_names(tensors)) == set(wanted)
    for module, update in wanted.items():
        torch.testing.assert_close(update_of(tensors, module), update)
    assert add_foreign_lora(transformer, tensors, "the file", "theirs") == len(wanted)
    if family == "flux2":  # diffusers moves the authors' weights alike
        moved = convert_flux2_transformer_checkpoint_to_diffusers(updates)
        assert {name.removesuffix(".weight") for name in moved} == set(wanted)
        for name, update in moved.items():
            torch.testing.assert_close(update_of(tensors, name.removesuffix(".weight")), update)


@pytest.mark.parametrize("prefix", ["lora_transformer_", "lora_unet_", "lycoris_"])
@pytest.mark.parametrize("family", FAMILIES)
def test_underscored_names_of_diffusers_are_known(family, prefix, tmp_path):
    make, _, layers = FAMILIES[family]
    transformer = make()
    truth = random_lora(transformer, linear_layers(transformer))
    written = {}
    for key, value in truth.items():
        module, letter = key.removesuffix(".weight").rsplit(".lora_", 1)
        written[f"{prefix}{module.replace('.', '_')}.lora_{'down' if letter == 'A' else 'up'}.weight"] = value
    save_file(written, tmp_path / "file.safetensors")
    found = read_foreign_lora(tmp_path / "file.safetensors", layers)
    assert found.keys() == truth.keys()
    assert all(torch.equal(found[key], value) for key, value in truth.items())


def test_xlabs_names_are_known(tmp_path):
    transformer = flux("small")
    names = {"double_blocks.0.processor.qkv_lora1": 96, "double_blocks.1.processor.proj_lora2": 32,
             "single_blocks.1.processor.qkv_lora": 96}  # fmt: skip
    written = {f"{name}.down.weight": noise(2, 32) for name in names}
    written |= {f"{name}.up.weight": noise(rows, 2) for name, rows in names.items()}
    save_file(written, tmp_path / "file.safetensors")
    tensors = read_foreign_lora(tmp_path / "file.safetensors", Flux1.authors_layers)
    queries = [f"transformer_blocks.0.attn.to_{letter}" for letter in "qkv"]
    queries += [f"single_transformer_blocks.1.attn.to_{letter}" for letter in "qkv"]
    assert set(layer_names(tensors)) == {*queries, "transformer_blocks.1.attn.to_add_out"}
    assert add_foreign_lora(transformer, tensors, "the file", "theirs") == 7


def test_what_was_not_trained_is_left_out_and_what_was_is_refused(tmp_path):
    path, name = tmp_path / "file.safetensors", "lora_unet_double_blocks_0_img_attn_proj"
    written = {f"{name}.lora_down.weight": noise(2, 32), f"{name}.lora_up.weight": noise(32, 2)}
    save_file(written | {f"{name}.diff_b": torch.zeros(32)}, path)
    assert len(read_foreign_lora(path, Flux1.authors_layers)) == 2
    save_file(written | {f"{name}.diff_b": torch.ones(32)}, path)
    with pytest.raises(UserError, match=r"diff_b: only plain LoRA"):
        read_foreign_lora(path, Flux1.authors_layers)


def test_one_layer_under_two_names_is_refused(tmp_path):
    path, name = tmp_path / "file.safetensors", "lora_unet_double_blocks_0_img_attn_proj"
    written = {f"{name}.lora_down.weight": noise(2, 32), f"{name}.lora_up.weight": noise(32, 2)}
    save_file(written | {"transformer.transformer_blocks.0.attn.to_out.0.lora_A.weight": noise(2, 32)}, path)
    with pytest.raises(UserError, match=r"holds transformer_blocks.0.attn.to_out.0.lora_A.weight twice"):
        read_foreign_lora(path, Flux1.authors_layers)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_folder_by_peft_brings_its_alphas(rslora, tmp_path):
    layers = ["x_embedder", "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k"]
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=layers, use_rslora=rslora, init_lora_weights=False,
        rank_pattern={} if rslora else {"x_embedder": 2},
        alpha_pattern={} if rslora else {"^transformer_blocks.0.attn.to_q": 8, "to_k": 5},
    )  # fmt: skip
    model = get_peft_model(flux("small"), config)
    model.save_pretrained(tmp_path)
    tensors = read_foreign_lora(tmp_path, Flux1.authors_layers)
    assert set(layer_names(tensors)) == set(layers)
    for name in layers:
        wanted = model.base_model.model.get_submodule(name).get_delta_weight("default")
        torch.testing.assert_close(update_of(tensors, name), wanted)
    before = file_digest(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text()) | {"lora_alpha": 1}
    (tmp_path / "adapter_config.json").write_text(json.dumps(written))
    assert file_digest(tmp_path) != before


@pytest.mark.parametrize("family", FAMILIES)
def test_alphas_count_beside_a_text_encoders_tensors(family, tmp_path, caplog):
    make, _, layers = FAMILIES[family]
    truth = random_lora(make(), ["transformer_blocks.0.attn.to_q"])
    written, _ = FORMS["alphas"](truth)
    encoder = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    written |= {f"{encoder}.lora_A.weight": noise(2, 8), f"{encoder}.lora_B.weight": noise(8, 2)}
    save_file(written, tmp_path / "both.safetensors")
    found = read_foreign_lora(tmp_path / "both.safetensors", layers)
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
