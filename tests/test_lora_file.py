"""The LoRA's file, also in the eyes of stock diffusers and peft."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from diffusers import FluxPipeline
from lora_helpers import RECORD, TIMES, both_passes, rewrite
from peft import get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from small_bases import SETTINGS, add_random_lora, drive, flux, noise, random_text

from scale_dit.errors import UserError
from scale_dit.lora import (
    ADAPTER,
    FILE_NAME,
    LoraSettings,
    add_lora,
    check_record,
    load_lora,
    lora_state,
    read_lora,
    remove_lora,
    save_lora,
)
from scale_dit.method import Method


def test_file_restores_the_same_velocity_and_removing_it_restores_the_base(tmp_path: Path):
    base, other = drive(flux("small")), drive(flux("small"))
    add_random_lora(base)
    path = save_lora(base.transformer, tmp_path, LoraSettings(4, 4), RECORD)
    settings, record = load_lora(other.transformer, tmp_path)
    other.guidance_adapters = (ADAPTER,)
    assert (settings.rank, settings.alpha, settings.scope) == (4, 4, "guidance")
    assert record["base"] == "small"
    assert record["scale"] == 2
    assert not any(parameter.requires_grad for parameter in other.transformer.parameters())
    with torch.no_grad():
        assert torch.equal(both_passes(base)[0], both_passes(other)[0])
        other.guidance_adapters = ()
        names = set(flux("small").state_dict())
        for _ in range(2):
            remove_lora(other.transformer)
            assert set(other.transformer.state_dict()) == names
            assert torch.equal(both_passes(other)[0], both_passes(drive(flux("small")))[0])
            load_lora(other.transformer, path)


def test_alpha_scales_the_update(tmp_path: Path):
    states = []
    for alpha in (4, 8):
        base = drive(flux("small"))
        add_random_lora(base)
        save_lora(base.transformer, tmp_path, LoraSettings(4, alpha), RECORD)
        other = drive(flux("small"))
        load_lora(other.transformer, tmp_path)
        states.append(other.transformer.x_embedder.scaling[ADAPTER])
    assert states == [1.0, 2.0]


@pytest.fixture
def written(small_folder: Path, tmp_path: Path):
    """A LoRA of the small base: the pipeline that it is in, and its folder."""
    pipeline = FluxPipeline.from_pretrained(small_folder)
    base = drive(pipeline.transformer)
    add_random_lora(base)
    save_lora(base.transformer, tmp_path / "lora", LoraSettings(4, 8), RECORD)
    return base, tmp_path / "lora"


def test_stock_diffusers_loads_every_tensor_and_computes_the_same(written, small_folder: Path, caplog):
    base, folder = written
    stock = FluxPipeline.from_pretrained(small_folder)
    stock.load_lora_weights(folder)
    assert not [message for message in caplog.messages if "text_encoder" not in message]
    (name,) = stock.transformer.peft_config
    loaded, own = get_peft_model_state_dict(stock.transformer, adapter_name=name), lora_state(base.transformer)
    assert loaded.keys() == own.keys()
    assert all(torch.equal(loaded[key], own[key]) for key in own)
    assert stock.transformer.x_embedder.scaling[name] == 2.0
    # Stock diffusers lets the LoRA act on every token, as our image pass does with the scope `all`.
    for layer in base.transformer.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.scaling[ADAPTER] = 2.0
    base.image_adapters = (ADAPTER,)
    text, tokens = random_text(1, base.transformer), noise(1, 30, 64)
    plan = Method(windowed=False, guidance=False, order="raster").plan(SETTINGS, 96, 80)
    with torch.no_grad():
        ours = base.image_pass(tokens, text, TIMES[:1], plan, None, 1)
        theirs, plain = (
            transformer(
                hidden_states=tokens,
                encoder_hidden_states=text.tokens,
                pooled_projections=text.pooled,
                timestep=TIMES[:1],
                img_ids=FluxPipeline._prepare_latent_image_ids(1, 6, 5, "cpu", torch.float32),
                txt_ids=torch.zeros(24, 3),
                return_dict=False,
            )[0]
            for transformer in (stock.transformer, FluxPipeline.from_pretrained(small_folder).transformer)
        )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    assert not torch.allclose(theirs, plain, atol=1e-3)


def test_peft_reads_the_names_without_the_prefix(written):
    _, folder = written
    tensors = safetensors.torch.load_file(folder / FILE_NAME)
    transformer = flux("small")
    transformer.load_lora_adapter(folder, prefix="transformer", weight_name=FILE_NAME, adapter_name="peft")
    loaded = get_peft_model_state_dict(transformer, adapter_name="peft")
    assert {f"transformer.{key}" for key in loaded} == set(tensors)
    assert all(torch.equal(value, tensors[f"transformer.{key}"]) for key, value in loaded.items())


def test_metadata_says_what_the_lora_is_for(written):
    _, folder = written
    with safetensors.safe_open(folder / FILE_NAME, framework="pt") as file:
        metadata = file.metadata()
    record = json.loads(metadata["scale_dit"])
    assert record["base"] == "small"
    assert {"scale", "window", "halo_cells", "scope", "anchors", "rank", "alpha", "lora_scope"} <= set(record)
    config = json.loads(metadata["lora_adapter_metadata"])
    assert config["transformer.r"] == 4
    assert config["transformer.lora_alpha"] == 8
    assert not list(folder.glob("*.partial"))


KEY = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, _: tensors.pop(KEY), r"1 are missing \(transformer_blocks.0.attn.to_q.lora_A.weight\)"),
        (
            lambda tensors, _: tensors.update({KEY.replace("blocks.0", "blocks.7"): tensors[KEY] + 0}),
            r"1 are unexpected \(transformer_blocks.7.attn.to_q.lora_A.weight\)",
        ),
        (
            lambda tensors, _: tensors.update({KEY: torch.zeros(4, 48)}),
            r"1 are of another size \(transformer_blocks.0.attn.to_q.lora_A.weight is \[4, 48\] instead of \[4, 32\]\)",
        ),
        (
            lambda _, record: record.update(rank=8),
            r"2 double and 2 single blocks of width 32. .* 40 are of another",
        ),
        (lambda _, record: record.pop("rank"), "does not say its rank"),
    ],
)
def test_what_does_not_fit_is_named_and_leaves_the_base_as_it_was(written, change, message):
    _, folder = written
    rewrite(folder, change)
    transformer = flux("small")
    names = set(transformer.state_dict())
    with pytest.raises(UserError, match=message):
        load_lora(transformer, folder)
    assert set(transformer.state_dict()) == names


def test_missing_truncated_and_foreign_files(written, tmp_path: Path):
    _, folder = written
    with pytest.raises(UserError, match="does not exist"):
        read_lora(tmp_path / "nowhere")
    path = folder / FILE_NAME
    truncated, whole = tmp_path / "cut.safetensors", path.read_bytes()
    truncated.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="truncated or no safetensors file"):
        read_lora(truncated)
    truncated.write_bytes(b"")
    with pytest.raises(UserError, match="truncated or no safetensors file"):
        read_lora(truncated)
    foreign = tmp_path / "foreign.safetensors"
    safetensors.torch.save_file({"lora_unet_down.weight": torch.zeros(2)}, foreign)
    with pytest.raises(UserError, match=r"1 of 1 keys do not look like .*'lora_unet_down.weight'"):
        read_lora(foreign)
    safetensors.torch.save_file(safetensors.torch.load_file(path), foreign)
    with pytest.raises(UserError, match="not written by Scale-DiT training"):
        read_lora(foreign)


def test_record_of_another_base_is_refused_and_of_another_method_told():
    with pytest.raises(UserError, match=r"trained on base 'small', but the base is 'flux1_dev'.*base=small"):
        check_record(RECORD, "flux1_dev", {})
    assert check_record(RECORD, "small", Method(scale=2).summary) == []
    assert check_record(RECORD, "small", Method(scale=4, anchors="none").summary) == [
        "the LoRA was trained with scale=2, now it is 4",
        "the LoRA was trained with anchors=scaled, now it is none",
    ]


def test_file_of_the_embedded_base_is_small(tmp_path: Path):
    transformer = flux("tiny")
    add_lora(transformer, LoraSettings())
    size = save_lora(transformer, tmp_path, LoraSettings(), RECORD).stat().st_size
    assert 100 * 2**10 < size < 4 * 2**20
