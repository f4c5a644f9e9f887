"""FLUX.1-dev of full size with random weights: what it costs does not depend on what it has learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import nn
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from scale_dit.models.settings import BaseSettings
from scale_dit.pipeline import ScaleDiTPipeline
from scale_dit.provenance import project_root

TRANSFORMER = {
    "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24,
    "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True, "axes_dims_rope": (16, 56, 56),
}  # fmt: skip
VAE = {
    "latent_channels": 16, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 0.3611, "shift_factor": 0.1159,
}  # fmt: skip
T5 = {
    "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
}  # fmt: skip
CLIP = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "projection_dim": 768,
}  # fmt: skip
CLASSES = {
    "transformer": ("diffusers", "FluxTransformer2DModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "T5EncoderModel"),
}


def write_configs(folder: Path) -> BaseSettings:
    """The folder of a base without its weights: what a plan is made from; returns its settings."""
    for name, part in zip(CLASSES, modules(), strict=True):
        (folder / name).mkdir(parents=True, exist_ok=True)
        if name.startswith("text"):
            part.config.save_pretrained(folder / name)
        else:
            part.save_config(folder / name)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"} | CLASSES))
    return BaseSettings(name="flux1_dev", path=str(folder))


def random_pipeline(settings: BaseSettings, backend: str = "auto") -> ScaleDiTPipeline:
    """The whole pipeline in host memory, bfloat16; numbers are drawn on the GPU, a layer at a time."""
    tokenizers = project_root() / "assets" / "tiny-flux"
    transformer, vae, clip, t5 = modules()
    parts: dict[str, Any] = {"transformer": transformer, "vae": vae, "text_encoder_2": t5}
    for module in parts.values():
        fill(module, torch.device("cpu"))
    t5.tie_weights()
    pipeline = ScaleDiTPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        tokenizer=AutoTokenizer.from_pretrained(tokenizers / "tokenizer"),
        tokenizer_2=AutoTokenizer.from_pretrained(tokenizers / "tokenizer_2"),
        text_encoder=CLIPTextModel(clip.config).to(torch.bfloat16).eval(),
        **parts,
    )
    pipeline.configure(settings, backend)
    return pipeline


def random_transformer() -> FluxTransformer2DModel:
    """The transformer alone, on the GPU."""
    return fill(modules()[0], torch.device("cuda"))


def fill(module: Any, place: torch.device) -> Any:
    """Give a module on `meta` random weights; linear maps keep lengths, so that numbers stay finite."""
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            number = torch.empty(parameter.shape, dtype=torch.bfloat16, device="cuda")
            if parameter.ndim > 1:
                number.normal_(std=parameter.shape[1:].numel() ** -0.5)
            else:
                number.fill_(1.0 if name == "weight" else 0.0)
            setattr(owner, name, nn.Parameter(number.to(place), requires_grad=False))
    return module.eval()


def modules(blocks: tuple[int, int] = (19, 38)) -> list[Any]:
    """The parts of `CLASSES` on `meta`, with so many double and single blocks."""
    sizes = TRANSFORMER | {"num_layers": blocks[0], "num_single_layers": blocks[1]}
    with torch.device("meta"):
        return [
            FluxTransformer2DModel(**sizes), AutoencoderKL(**VAE), CLIPTextModel(CLIPTextConfig(**CLIP)),
            T5EncoderModel(T5Config(**T5)),
        ]  # fmt: skip
