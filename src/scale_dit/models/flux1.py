"""FLUX.1 (and everything of its architecture)."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxPipeline
from diffusers.models.transformers.transformer_flux import (
    FluxAttnProcessor,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import Tensor

from scale_dit.lora_targets import adapt
from scale_dit.models.driver import Driver, Rotary
from scale_dit.models.flux_attention import BlockAttention, KeysValues, LayoutAttnProcessor, project
from scale_dit.models.text import Text

QUERY_KEY_VALUE = ("attn.to_q", "attn.to_k", "attn.to_v")
adapt(FluxTransformerBlock, (*QUERY_KEY_VALUE, "attn.to_out.0", "ff.net.0.proj", "ff.net.2"), QUERY_KEY_VALUE[1:])
adapt(FluxSingleTransformerBlock, (*QUERY_KEY_VALUE, "proj_mlp", "proj_out"), QUERY_KEY_VALUE[1:])

DOUBLE, SINGLE = "transformer_blocks.{}", "single_transformer_blocks.{}"
IMAGE_ATTENTION = tuple(f"{DOUBLE}.{layer}" for layer in QUERY_KEY_VALUE)
TEXT_ATTENTION = tuple(f"{DOUBLE}.attn.add_{letter}_proj" for letter in "qkv")
SINGLE_ATTENTION = tuple(f"{SINGLE}.{layer}" for layer in QUERY_KEY_VALUE)
AUTHORS_LAYERS = {
    "double_blocks.{}.img_attn.qkv": IMAGE_ATTENTION,
    "double_blocks.{}.img_attn.proj": (f"{DOUBLE}.attn.to_out.0",),
    "double_blocks.{}.img_mlp.0": (f"{DOUBLE}.ff.net.0.proj",),
    "double_blocks.{}.img_mlp.2": (f"{DOUBLE}.ff.net.2",),
    "double_blocks.{}.img_mod.lin": (f"{DOUBLE}.norm1.linear",),
    "double_blocks.{}.txt_attn.qkv": TEXT_ATTENTION,
    "double_blocks.{}.txt_attn.proj": (f"{DOUBLE}.attn.to_add_out",),
    "double_blocks.{}.txt_mlp.0": (f"{DOUBLE}.ff_context.net.0.proj",),
    "double_blocks.{}.txt_mlp.2": (f"{DOUBLE}.ff_context.net.2",),
    "double_blocks.{}.txt_mod.lin": (f"{DOUBLE}.norm1_context.linear",),
    "single_blocks.{}.linear1": (*SINGLE_ATTENTION, f"{SINGLE}.proj_mlp"),
    "single_blocks.{}.linear2": (f"{SINGLE}.proj_out",),
    "single_blocks.{}.modulation.lin": (f"{SINGLE}.norm.linear",),
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    # XLabs' trainer names the attention's processors.
    "double_blocks.{}.processor.qkv_lora1": IMAGE_ATTENTION,
    "double_blocks.{}.processor.qkv_lora2": TEXT_ATTENTION,
    "double_blocks.{}.processor.proj_lora1": (f"{DOUBLE}.attn.to_out.0",),
    "double_blocks.{}.processor.proj_lora2": (f"{DOUBLE}.attn.to_add_out",),
    "single_blocks.{}.processor.qkv_lora": SINGLE_ATTENTION,
    "single_blocks.{}.processor.proj_lora": (f"{SINGLE}.proj_out",),
}


class Flux1(Driver):
    """FLUX.1: CLIP and T5, three rotary axes of which text uses none, modulation in every block."""

    stock = FluxPipeline
    authors_layers = AUTHORS_LAYERS
    parts = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "transformer")

    def set_processors(self) -> None:
        """One processor for all blocks."""
        self.transformer.set_attn_processor(LayoutAttnProcessor(FluxAttnProcessor()))

    def embed_time(self, time: Tensor, guidance_scale: float, pooled: Tensor) -> Tensor:
        """Modulation vector `[B, C]`; time stays float32 until it is embedded (bfloat16 would round it to 1/256)."""
        embed = self.transformer.time_text_embed
        pooled = pooled.to(self.dtype)
        if self.transformer.config.guidance_embeds:
            scale = torch.full_like(time, guidance_scale)
            return embed(time.float() * 1000, scale.float() * 1000, pooled)
        return embed(time.float() * 1000, pooled)

    def call_block(
        self, block: Any, image: Tensor, text: Tensor, modulation: Tensor, rotary: Rotary, attention: BlockAttention
    ) -> tuple[Tensor, Tensor]:
        """Double and single blocks are called alike."""
        return block(
            hidden_states=image,
            encoder_hidden_states=text,
            temb=modulation,
            image_rotary_emb=rotary,
            joint_attention_kwargs={"block_attention": attention},
        )

    def block_keys_values(self, block: Any, hidden: Tensor, modulation: Tensor, rotary: Rotary) -> KeysValues:
        """Norm and projections of the block's attention."""
        norm = block.norm1 if hasattr(block, "norm1") else block.norm
        _, key, value = project(block.attn, norm(hidden, emb=modulation)[0], rotary, self.fuses())
        return key, value

    def last_layer(self, image: Tensor, modulation: Tensor) -> Tensor:
        """The stock output layers."""
        return self.transformer.proj_out(self.transformer.norm_out(image, modulation))

    def token_ids(self, ids: Tensor) -> Tensor:
        """FLUX.1 has no other axes."""
        return ids

    def text_ids(self, length: int) -> Tensor:
        """All zero."""
        return torch.zeros(length, 3)

    def encode_text(self, prompts: list[str], length: int, device: torch.device | None = None) -> Text:
        """T5's tokens, and CLIP's pooled vector."""
        tokens, pooled, _ = self.pipeline.encode_prompt(prompts, device=device, max_sequence_length=length)
        return Text(tokens, pooled)

    def cut_text(self, prompt: str, length: int) -> tuple[int, str]:
        """What T5 cuts; its end token stays.

        What CLIP cuts at 77 tokens as ever is not worth a warning: the transformer sees only its pooled vector.
        """
        tokenizer = self.pipeline.tokenizer_2
        ids = tokenizer(prompt, truncation=False, verbose=False).input_ids
        beyond = ids[length - 1 :] if len(ids) > length else []
        return len(ids), tokenizer.decode(beyond, skip_special_tokens=True)

    @property
    def pooled_size(self) -> int:
        """Width of CLIP's vector."""
        return self.transformer.config.pooled_projection_dim

    def normalise(self, latents: Tensor) -> Tensor:
        """One shift and one factor for all channels."""
        config = self.pipeline.vae.config
        return (latents - config.shift_factor) * config.scaling_factor

    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        config = self.pipeline.vae.config
        return latents / config.scaling_factor + config.shift_factor
