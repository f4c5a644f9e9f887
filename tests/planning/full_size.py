"""Transformers of full size without weights."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from scale_dit.planning.components import Components

FLUX1_DEV = {
    "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24,
    "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True, "axes_dims_rope": (16, 56, 56),
}  # fmt: skip
FLUX1_VAE = {
    "latent_channels": 16, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip
T5_XXL = {
    "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
CLIP_LARGE = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "projection_dim": 768,
}  # fmt: skip


def flux1_dev(blocks: tuple[int, int] | None = None) -> Components:
    """FLUX.1-dev in bfloat16 on `meta`, with all its blocks or so many double and single ones."""
    sizes = FLUX1_DEV if blocks is None else FLUX1_DEV | {"num_layers": blocks[0], "num_single_layers": blocks[1]}
    with torch.device("meta"):
        modules: dict[str, nn.Module] = {
            "transformer": FluxTransformer2DModel(**sizes),
            "vae": AutoencoderKL(**FLUX1_VAE),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**CLIP_LARGE)),
            "text_encoder_2": T5EncoderModel(T5Config(**T5_XXL)),
        }
    return Components({name: nn.Module.to(module, torch.bfloat16) for name, module in modules.items()})
