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


class Flux1(Driver):
    """FLUX.1: CLIP and T5, three rotary axes of which text uses none, modulation in every block."""

    stock = FluxPipeline
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
