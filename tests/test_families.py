"""Every family from the folder on: stock pipelines, training, generation, LoRA files, on tiny random bases."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import run
from diffusers import DiffusionPipeline
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from safetensors.torch import load_file, save_file
from training_runs import ROOT, SHORT

from scale_dit.errors import UserError
from scale_dit.lora import read_lora
from scale_dit.models import load_family
from scale_dit.models.random_weights import TINY, base_settings, main, write_base
from scale_dit.models.settings import BaseSettings
from scale_dit.models.shapes import SHAPES, shape_of
from scale_dit.pipeline import ScaleDiTPipeline
from scale_dit.training import train

EXPERIMENTS = {"scale_dit_4k": "flux1_dev", "scale_dit_8k": "flux1_dev", "klein_4k": "klein_base_9b",
               "klein_8k": "klein_base_9b"}  # fmt: skip
GEOMETRY = [f"base.{name}={value}" for name, value in TINY.items()]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny random base of each kind."""
    root = tmp_path_factory.mktemp("families")
    for name in ("flux1_dev", "klein_4b", "klein_base_9b"):
        write_base(name, root / name, dtype=torch.float32)
    return {folder.name: folder for folder in root.iterdir()}


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def config_of(entry: str, experiment: str, *more: str):
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose(entry, overrides=[f"experiment={experiment}", *more])


@pytest.mark.parametrize(("experiment", "base"), EXPERIMENTS.items())
@pytest.mark.parametrize("entry", ["train", "generate"])
def test_every_experiment_composes(entry, experiment, base):
    config = config_of(entry, experiment)
    assert instantiate(config.base).name == base
    assert config.scale == (8 if experiment.endswith("8k") else 4)


@pytest.mark.parametrize("name", SHAPES["full"])
def test_configs_and_python_agree_about_a_base(name):
    """What `BaseSettings` knows of a hub id without the configs is what the configs say."""
    settings = base_settings(name)
    config = config_of("train", "scale_dit_4k", f"base={name}")
    assert instantiate(config.base).family == settings.family
    shape = shape_of(name, "full")
    distilled = BaseSettings.of_kind(shape["transformer"].kind, name, settings.distilled)
    assert distilled.family == settings.family
    if "klein" in name:
        assert (distilled.shift, distilled.steps, distilled.guidance_scale, distilled.distilled) == (
            settings.shift, settings.steps, settings.guidance_scale, settings.distilled
        )  # fmt: skip


@pytest.mark.parametrize("name", ["klein_4b", "klein_base_9b"])
@torch.no_grad()
def test_klein_is_the_stock_pipeline_from_the_same_seed(folders, name):
    stock = DiffusionPipeline.from_pretrained(folders[name])
    pipeline = ScaleDiTPipeline.from_pretrained(folders[name])
    scale = 1.0 if name == "klein_4b" else 3.0
    wanted = stock(
        prompt=["a red circle", "sand"], height=128, width=96, generator=seeded(1, 2), num_inference_steps=3,
        guidance_scale=scale, max_sequence_length=48, output_type="latent",
    ).images  # fmt: skip
    drafts, _ = pipeline.make_drafts(["a red circle", "sand"], 512, 384, 4.0, 3, scale, seeded(1, 2))
    torch.testing.assert_close(pipeline.base.denormalise(drafts), wanted, rtol=0, atol=1e-4)
    pictures = stock.vae.decode(wanted, return_dict=False)[0] / 2 + 0.5
    torch.testing.assert_close(pipeline.base.decode_latents(drafts), pictures.clamp(0, 1), rtol=0, atol=1e-4)
    images = torch.rand(2, 3, 64, 96)
    latents = stock._encode_vae_image(images * 2 - 1, None)
    encoded = stock._unpatchify_latents(latents)
    torch.testing.assert_close(pipeline.base.encode_images(images), encoded, rtol=0, atol=1e-5)
    torch.testing.assert_close(pipeline.base.normalise(pipeline.base.denormalise(drafts)), drafts, rtol=0, atol=1e-5)


def test_a_family_is_known_by_its_weights(folders, tmp_path):
    """Without the settings beside them."""
    folder = tmp_path / "FLUX.2-klein-4B"
    folder.symlink_to(folders["klein_4b"])
    (bare := tmp_path / "bare" / "FLUX.2-klein-4B").mkdir(parents=True)
    for part in folder.iterdir():
        if part.name != "scale_dit.json":
            (bare / part.name).symlink_to(part)
    settings = ScaleDiTPipeline.from_pretrained(bare).settings
    assert (settings.name, settings.family, settings.steps) == ("klein_4b", "scale_dit.models.flux2.Flux2Klein", 4)


def test_what_a_long_prompt_loses_is_said(folders, caplog):
    base = ScaleDiTPipeline.from_pretrained(folders["klein_4b"]).base
    base.encode_prompts(["a large red circle"])
    assert not caplog.records
    base.encode_prompts(["a large red circle " * 20 + "zebra"])
    assert "it does not see:" in caplog.text
    assert caplog.text.rstrip().endswith("circle zebra")


@pytest.mark.parametrize("name", ["flux1_dev", "klein_base_9b"])
def test_a_tiny_base_trains_and_its_lora_acts_in_generation(folders, tmp_path, name):
    experiment = "scale_dit_4k" if name == "flux1_dev" else "klein_4k"
    config = config_of(
        "train", experiment, f"base={name}", f"base.path={folders[name]}", *GEOMETRY, *SHORT,
        f"paths.output_dir={tmp_path}", "trainer.max_steps=2",
    )  # fmt: skip
    train(config)
    (lora,) = tmp_path.rglob("pytorch_lora_weights.safetensors")
    tensors, record = read_lora(lora)
    assert record["base"] == name
    pipeline = ScaleDiTPipeline.from_pretrained(folders[name])
    options = {"height": 256, "width": 256, "scale": 2, "num_inference_steps": 1, "draft_steps": 1}
    without = pipeline("a red circle", **options, generator=seeded(1), output_type="latent").images
    pipeline.load_lora_weights(lora)
    with_lora = pipeline("a red circle", **options, generator=seeded(1), output_type="latent").images
    assert not torch.equal(without, with_lora)
    assert sum(hasattr(layer, "lora_A") for layer in pipeline.transformer.modules()) * 2 == len(tensors)


@pytest.mark.parametrize("name", ["flux1_dev", "klein_4b"])
@torch.no_grad()
def test_a_transformer_in_one_file_is_used(folders, tmp_path, name):
    other = write_base(name, tmp_path / "other", dtype=torch.float32, seed=7)
    (file,) = Path(other.path, "transformer").glob("*.safetensors")
    settings = BaseSettings.of(str(folders[name]))
    settings = replace(settings, transformer_file=str(file))
    wanted = load_file(file)
    for loaded in (
        ScaleDiTPipeline.from_pretrained(settings.path, settings).transformer,
        load_family(settings).load(settings).transformer,
    ):
        found = loaded.state_dict()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_original_names_in_one_file_are_converted(folders, tmp_path):
    """As FLUX.2 is published: query, key and value of double blocks are one layer there."""
    settings = BaseSettings.of(str(folders["klein_4b"]))
    (file,) = Path(settings.path, "transformer").glob("*.safetensors")
    state = load_file(file)
    save_file(original_names(state), tmp_path / "klein.safetensors")
    given = replace(settings, transformer_file=str(tmp_path / "klein.safetensors"))
    found = ScaleDiTPipeline.from_pretrained(given.path, given).transformer.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)


def original_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A tiny FLUX.2 by the names of its authors' code."""
    outer = {
        "x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear",
        "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
        "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
        "single_stream_modulation.linear": "single_stream_modulation.lin",
    }  # fmt: skip
    found = {f"{new}.weight": state[f"{old}.weight"] for old, new in outer.items()}
    shift, scale = state["norm_out.linear.weight"].chunk(2)[::-1]
    found["final_layer.adaLN_modulation.1.weight"] = torch.cat([shift, scale])
    inner = {
        "attn.to_out.0.weight": "img_attn.proj.weight", "attn.to_add_out.weight": "txt_attn.proj.weight",
        "attn.norm_q.weight": "img_attn.norm.query_norm.scale", "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
        "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
        "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
        "ff.linear_in.weight": "img_mlp.0.weight", "ff.linear_out.weight": "img_mlp.2.weight",
        "ff_context.linear_in.weight": "txt_mlp.0.weight", "ff_context.linear_out.weight": "txt_mlp.2.weight",
    }  # fmt: skip
    for block in range(2):
        own = f"transformer_blocks.{block}"
        found |= {f"double_blocks.{block}.{new}": state[f"{own}.{old}"] for old, new in inner.items()}
        for stream, names in (("img", ("to_q", "to_k", "to_v")), ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"))):
            joined = torch.cat([state[f"{own}.attn.{name}.weight"] for name in names])
            found[f"double_blocks.{block}.{stream}_attn.qkv.weight"] = joined
    for block in range(3):
        own, new = f"single_transformer_blocks.{block}.attn", f"single_blocks.{block}"
        found |= {
            f"{new}.linear1.weight": state[f"{own}.to_qkv_mlp_proj.weight"],
            f"{new}.linear2.weight": state[f"{own}.to_out.weight"],
            f"{new}.norm.query_norm.scale": state[f"{own}.norm_q.weight"],
            f"{new}.norm.key_norm.scale": state[f"{own}.norm_k.weight"],
        }
    return found


def test_a_file_that_is_no_transformer_of_this_base_is_refused(folders, tmp_path):
    settings = BaseSettings.of(str(folders["klein_4b"]))
    (own,) = Path(settings.path, "transformer").glob("*.safetensors")
    state = load_file(own)
    for name, tensors in {
        "lacking": dict(list(state.items())[1:]),
        "vae": {"decoder.conv_in.weight": torch.zeros(2, 2)},
        "larger": {key: torch.cat([value, value]) for key, value in state.items()},
    }.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        given = replace(settings, transformer_file=str(tmp_path / f"{name}.safetensors"))
        with pytest.raises(UserError, match="does not fit base 'klein_4b', whose transformer is a Flux2"):
            ScaleDiTPipeline.from_pretrained(given.path, given)
    (tmp_path / "cut.safetensors").write_bytes(own.read_bytes()[:100])
    for name, message in {"cut": "truncated", "none": "does not exist"}.items():
        with pytest.raises(UserError, match=message):
            replace(settings, transformer_file=str(tmp_path / f"{name}.safetensors")).check_weights()


def test_random_weights_are_made_by_a_command(tmp_path):
    main([f"out={tmp_path}/base", "base=klein_base_4b", "size=tiny"])
    assert BaseSettings.of(f"{tmp_path}/base").name == "klein_base_4b"
    stock = DiffusionPipeline.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    assert not stock.config.is_distilled
    assert sum(file.stat().st_size for file in (tmp_path / "base").rglob("*")) < 8e6
    for arguments, message in {
        ("base=klein_4b",): "out=", ("out=x", "base=sdxl"): "no random weights for base 'sdxl'",
        ("out=x", "size=huge"): "unknown size 'huge'", ("out=x", "colour=red"): "unknown arguments colour",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=message):
            main(arguments)


@pytest.mark.slow
def test_the_command_generates_with_a_style(folders, tmp_path):
    """`src/generate.py` on a tiny klein, with a LoRA by others for the draft and a style."""
    layer = ScaleDiTPipeline.from_pretrained(folders["klein_4b"]).transformer.x_embedder
    matrices = {"lora_A": torch.ones(1, layer.in_features), "lora_B": torch.ones(layer.out_features, 1)}
    save_file(
        {f"transformer.x_embedder.{key}.weight": value for key, value in matrices.items()}, tmp_path / "a.safetensors"
    )
    ran = run(
        "generate.py", "experiment=klein_4k", "base=klein_4b",
        f"base.path={folders['klein_4b']}", *GEOMETRY, "prompt=sand", "height=256", "width=256", "scale=2",
        f"output={tmp_path}/out", f"hydra.run.dir={tmp_path}/log", "lora.path=a.safetensors",
        "lora.base=klein_4b",
        "style_loras=[{path: a.safetensors, weight: 0.5, name: style}]", cwd=tmp_path,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert len(list((tmp_path / "out").glob("*.png"))) == 1
