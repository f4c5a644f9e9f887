"""FLUX.2-klein (4B and 9B; base and distilled)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import Flux2KleinPipeline
from diffusers.models.transformers.transformer_flux2 import (
    Flux2AttnProcessor,
    Flux2Modulation,
    Flux2SingleTransformerBlock,
    Flux2TransformerBlock,
)
from torch import Tensor

from scale_dit.lora_targets import adapt
from scale_dit.models.driver import Driver, Rotary
from scale_dit.models.flux2_attention import ParallelAttnProcessor, project_parallel
from scale_dit.models.flux_attention import BlockAttention, KeysValues, LayoutAttnProcessor, project
from scale_dit.models.settings import BaseSettings
from scale_dit.models.text import Text

QUERY_KEY_VALUE = ("attn.to_q", "attn.to_k", "attn.to_v")
adapt(Flux2TransformerBlock, (*QUERY_KEY_VALUE, "attn.to_out.0", "ff.linear_in", "ff.linear_out"), QUERY_KEY_VALUE[1:])
# Query, key, value and feed-forward are one layer.
adapt(Flux2SingleTransformerBlock, ("attn.to_qkv_mlp_proj", "attn.to_out"), ("attn.to_qkv_mlp_proj",))

DOUBLE, SINGLE = "transformer_blocks.{}", "single_transformer_blocks.{}"
AUTHORS_LAYERS = {
    "double_blocks.{}.img_attn.qkv": tuple(f"{DOUBLE}.{layer}" for layer in QUERY_KEY_VALUE),
    "double_blocks.{}.img_attn.proj": (f"{DOUBLE}.attn.to_out.0",),
    "double_blocks.{}.img_mlp.0": (f"{DOUBLE}.ff.linear_in",),
    "double_blocks.{}.img_mlp.2": (f"{DOUBLE}.ff.linear_out",),
    "double_blocks.{}.txt_attn.qkv": tuple(f"{DOUBLE}.attn.add_{letter}_proj" for letter in "qkv"),
    "double_blocks.{}.txt_attn.proj": (f"{DOUBLE}.attn.to_add_out",),
    "double_blocks.{}.txt_mlp.0": (f"{DOUBLE}.ff_context.linear_in",),
    "double_blocks.{}.txt_mlp.2": (f"{DOUBLE}.ff_context.linear_out",),
    "single_blocks.{}.linear1": (f"{SINGLE}.attn.to_qkv_mlp_proj",),
    "single_blocks.{}.linear2": (f"{SINGLE}.attn.to_out",),
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_guidance_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_guidance_embed.timestep_embedder.linear_2",),
    "guidance_in.in_layer": ("time_guidance_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_guidance_embed.guidance_embedder.linear_2",),
    "double_stream_modulation_img.lin": ("double_stream_modulation_img.linear",),
    "double_stream_modulation_txt.lin": ("double_stream_modulation_txt.linear",),
    "single_stream_modulation.lin": ("single_stream_modulation.linear",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}


@dataclass(frozen=True)
class Modulation:
    """What all blocks of a kind share: shifts, scales and gates of double blocks' streams and of single blocks.

    Attributes:
        embedding: Of the time, `[B, C]`; the output layer makes its own of it.
    """

    embedding: Tensor
    image: Tensor
    text: Tensor
    single: Tensor


class Flux2Klein(Driver):
    """FLUX.2-klein: Qwen3, four rotary axes (time, row, column, word), one modulation for all blocks of a kind."""

    stock = Flux2KleinPipeline
    authors_layers = AUTHORS_LAYERS
    parts = ("scheduler", "vae", "text_encoder", "tokenizer", "transformer")

    @classmethod
    def stock_pipeline(cls, components: dict[str, Any], settings: BaseSettings) -> Any:
        """It has to be told that there is no classifier-free guidance."""
        parts = {name: components[name] for name in cls.parts}
        return Flux2KleinPipeline(**parts, is_distilled=settings.distilled)

    def set_processors(self) -> None:
        """Double blocks attend as FLUX.1's do; single ones have a projection of their own."""
        double, single = LayoutAttnProcessor(Flux2AttnProcessor()), ParallelAttnProcessor()
        names = self.transformer.attn_processors
        self.transformer.set_attn_processor({name: single if name.startswith("single_") else double for name in names})

    def embed_time(self, time: Tensor, guidance_scale: float, pooled: Tensor) -> Modulation:
        """The shared modulation; time stays float32 until it is embedded. There is no pooled text."""
        transformer = self.transformer
        embed = transformer.time_guidance_embed
        embedding = embed.timestep_embedder(embed.time_proj(time.float() * 1000).to(self.dtype))
        if embed.guidance_embedder is not None:
            scale = torch.full_like(time, guidance_scale).float() * 1000
            embedding = embedding + embed.guidance_embedder(embed.time_proj(scale).to(self.dtype))
        return Modulation(
            embedding,
            transformer.double_stream_modulation_img(embedding),
            transformer.double_stream_modulation_txt(embedding),
            transformer.single_stream_modulation(embedding),
        )

    def call_block(
        self, block: Any, image: Tensor, text: Tensor, modulation: Modulation, rotary: Rotary, attention: BlockAttention
    ) -> tuple[Tensor, Tensor]:
        """Double and single blocks take different modulation."""
        shared: dict[str, Any] = {
            "hidden_states": image,
            "encoder_hidden_states": text,
            "image_rotary_emb": rotary,
            "joint_attention_kwargs": {"block_attention": attention},
        }
        if isinstance(block, Flux2SingleTransformerBlock):
            return block(**shared, temb_mod=modulation.single, split_hidden_states=True)
        return block(**shared, temb_mod_img=modulation.image, temb_mod_txt=modulation.text)

    def block_keys_values(self, block: Any, hidden: Tensor, modulation: Modulation, rotary: Rotary) -> KeysValues:
        """Norm, modulation and projections of the block's attention."""
        single = isinstance(block, Flux2SingleTransformerBlock)
        norm, sets = (block.norm, 1) if single else (block.norm1, 2)
        shift, scale, _ = Flux2Modulation.split(modulation.single if single else modulation.image, sets)[0]
        normed = (1 + scale) * norm(hidden) + shift
        if single:
            (_, key, value), _ = project_parallel(block.attn, normed, rotary, self.fuses(), None)
        else:
            _, key, value = project(block.attn, normed, rotary, self.fuses())
        return key.contiguous(), value.contiguous()

    def last_layer(self, image: Tensor, modulation: Modulation) -> Tensor:
        """The stock output layers."""
        return self.transformer.proj_out(self.transformer.norm_out(image, modulation.embedding))

    def token_ids(self, ids: Tensor) -> Tensor:
        """Pictures' tokens are at word 0; the draft's are at time 0 as the picture's (the reference pictures of the
        stock pipeline sit at 10, 20, ...)."""
        return torch.nn.functional.pad(ids, (0, 1))

    def text_ids(self, length: int) -> Tensor:
        """The last axis counts the words."""
        return torch.nn.functional.pad(torch.arange(length, dtype=torch.float32)[:, None], (3, 0))

    def encode_text(self, prompts: list[str], length: int, device: torch.device | None = None) -> Text:
        """Three of Qwen3's layers side by side, as the stock pipeline takes them."""
        tokens, _ = self.pipeline.encode_prompt(prompts, device=device, max_sequence_length=length)
        return Text(tokens, tokens.new_empty(len(tokens), 0))

    def cut_text(self, prompt: str, length: int) -> tuple[int, str]:
        """The prompt stands in a chat template, whose end is not the user's text."""
        tokenizer = self.pipeline.tokenizer
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        ids = tokenizer(chat, truncation=False, verbose=False).input_ids
        template_end = chat[chat.rfind(prompt) + len(prompt) :]
        return len(ids), tokenizer.decode(ids[length:]).removesuffix(template_end)

    @property
    def pooled_size(self) -> int:
        """There is no pooled text."""
        return 0

    def noise(self, height: int, width: int, generator: torch.Generator) -> Tensor:
        """The stock pipeline draws it in the packed order: `[1, 4C, height, width]`."""
        shape = (1, 4 * self.latent_channels, height, width)
        packed = torch.randn(shape, generator=generator, device=generator.device)
        return Flux2KleinPipeline._unpatchify_latents(packed)

    def normalise(self, latents: Tensor) -> Tensor:
        """By the running statistics of the autoencoder's batch norm, one for each channel of a 2x2 patch."""
        mean, deviation = self._statistics(latents)
        patches = (Flux2KleinPipeline._patchify_latents(latents) - mean) / deviation
        return Flux2KleinPipeline._unpatchify_latents(patches)

    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        mean, deviation = self._statistics(latents)
        patches = Flux2KleinPipeline._patchify_latents(latents) * deviation + mean
        return Flux2KleinPipeline._unpatchify_latents(patches)

    def _statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation `[1, 4C, 1, 1]`, where the latents are."""
        vae = self.pipeline.vae
        mean, variance = (
            buffer.to(latents.device, latents.dtype).view(1, -1, 1, 1)
            for buffer in (vae.bn.running_mean, vae.bn.running_var)
        )
        return mean, (variance + vae.config.batch_norm_eps).sqrt()
