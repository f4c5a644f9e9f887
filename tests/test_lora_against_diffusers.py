"""What kohya's names come to is what diffusers' own converters make of them, where those know the layer."""

from __future__ import annotations

import pytest
import torch
from diffusers import Flux2KleinPipeline, FluxPipeline
from safetensors.torch import save_file
from small_bases import noise

from scale_dit.lora_exchange import read_foreign_lora
from scale_dit.lora_fit import layer_names
from scale_dit.models.flux1 import Flux1
from scale_dit.models.flux2 import Flux2Klein

WIDTH = 3072  # the converters know no other
DOUBLE = {"attn_qkv": (3, 1), "attn_proj": (1, 1), "mlp_0": (4, 1), "mlp_2": (1, 4)}
"""Outputs and inputs of layers, in widths."""
SINGLE = {"linear1": (7, 1), "linear2": (1, 5)}
MODULATION = {"double_blocks_0_img_mod_lin": (6, 1), "single_blocks_0_modulation_lin": (3, 1)}


@pytest.mark.parametrize("family", ["flux1", "flux2"])
def test_kohyas_names_come_to_what_diffusers_makes_of_them(family, tmp_path):
    driver, stock = (Flux1, FluxPipeline) if family == "flux1" else (Flux2Klein, Flux2KleinPipeline)
    layers = {f"double_blocks_0_{stream}_{name}": size for stream in ("img", "txt") for name, size in DOUBLE.items()}
    layers |= {f"single_blocks_0_{name}": size for name, size in SINGLE.items()}
    layers |= MODULATION if family == "flux1" else {}
    written = {}
    for seed, (name, (outputs, inputs)) in enumerate(layers.items()):
        written |= {
            f"lora_unet_{name}.lora_down.weight": noise(2, inputs * WIDTH, seed=seed),
            f"lora_unet_{name}.lora_up.weight": noise(outputs * WIDTH, 2, seed=seed + 100),
            f"lora_unet_{name}.alpha": torch.tensor(1.0),
        }
    save_file(written, tmp_path / "kohya.safetensors")
    found = read_foreign_lora(tmp_path / "kohya.safetensors", driver.authors_layers)
    converted = stock.lora_state_dict(written)
    theirs = {name.removeprefix("transformer."): tensor for name, tensor in converted.items()}
    assert found.keys() == theirs.keys()
    for each in layer_names(found):
        ours, other = (
            held[f"{each}.lora_B.weight"] @ held[f"{each}.lora_A.weight"][:, ::64] for held in (found, theirs)
        )
        torch.testing.assert_close(ours, other)
