"""FLUX.1 (and everything of its architecture): the guidance pass and the image pass over diffusers' own blocks.

Both passes run the unmodified blocks of a `FluxTransformer2DModel`. What differs from stock is the attention processor,
which reads the layout, and that blocks are driven here instead of in `FluxTransformer2DModel.forward`: the guidance
pass has no text and no noise and needs keys and values only, and the timestep stays in float32 up to its embedding.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scale_dit.anchors import ntk_theta, yarn_rotary
from scale_dit.attention import avoid_failing_kernels
from scale_dit.autoencoder import Decoding, decode, decode_bands, encode
from scale_dit.errors import UserError
from scale_dit.lora import active_adapters
from scale_dit.method import Method, Plan
from scale_dit.models.chunking import chunked_feed_forward
from scale_dit.models.flux_attention import BlockAttention, KeysValues, LayoutAttnProcessor, block_keys_values, fuses
from scale_dit.models.hooks import called, calls_transformer
from scale_dit.models.keys_values import HostKeysValues
from scale_dit.models.settings import BaseSettings
from scale_dit.models.text import Text
from scale_dit.quiet import truncating_quietly

log = logging.getLogger(__name__)


class Flux1:
    """Drives a FLUX.1 pipeline's transformer, text encoders and autoencoder.

    Args:
        pipeline: A stock `FluxPipeline`; its transformer gets `LayoutAttnProcessor`s, which by themselves change
            nothing.
        settings: The base's geometry.
        backend: Attention backend, see `scale_dit.attention`.
        gradient_checkpointing: Recompute blocks in the backward pass.

    Attributes:
        feed_forward_tokens: Tokens that go through a feed-forward layer at a time; `None`: all.
        keys_values_on_host: Keep the draft's keys and values in host memory.
        known_texts: Prompts that were encoded ahead, in host memory.
    """

    def __init__(
        self,
        pipeline: FluxPipeline,
        settings: BaseSettings,
        backend: str = "auto",
        gradient_checkpointing: bool = False,
    ):
        self.pipeline, self.settings, self.backend = pipeline, settings, backend
        self.gradient_checkpointing = gradient_checkpointing
        self.feed_forward_tokens: int | None = None
        self.keys_values_on_host = False
        self.known_texts: dict[tuple[str, ...], Text] = {}
        self.guidance_adapters: tuple[str, ...] = ()
        self.image_adapters: tuple[str, ...] = ()
        avoid_failing_kernels(self.transformer.config.attention_head_dim)
        self.transformer.set_attn_processor(LayoutAttnProcessor())

    @classmethod
    def load(
        cls,
        settings: BaseSettings,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        **options: object,
    ) -> Flux1:
        """Load the weights that `settings.path` names.

        Raises:
            UserError: The weights cannot be had.
        """
        settings.check_weights()
        pipeline = FluxPipeline.from_pretrained(settings.path, dtype=dtype)
        return cls(pipeline.to(device), settings, **options)  # type: ignore[arg-type]

    @classmethod
    def from_components(cls, components: dict[str, Any], settings: BaseSettings, backend: str = "auto") -> Flux1:
        """Drive components that are loaded already, by the names of `FluxPipeline`."""
        names = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "transformer")
        return cls(FluxPipeline(**{name: components[name] for name in names}), settings, backend)

    @property
    def transformer(self) -> FluxTransformer2DModel:
        """The diffusion transformer."""
        return self.pipeline.transformer

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        return self.transformer.device

    @property
    def dtype(self) -> torch.dtype:
        """The transformer's dtype."""
        return self.transformer.dtype

    def to(self, device: torch.device) -> None:
        """Move every module."""
        self.pipeline.to(device)

    def freeze(self) -> None:
        """No gradients, and evaluation mode, for every module."""
        for module in self.pipeline.components.values():
            if isinstance(module, nn.Module):
                module.requires_grad_(False).eval()

    @property
    def latent_channels(self) -> int:
        """Channels of the unpacked latents."""
        return self.transformer.config.in_channels // 4

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Text:
        """Encode prompts with both text encoders; text beyond `settings.text_length` tokens is cut with a warning.

        What CLIP cuts at 77 tokens as ever is not worth one: the transformer sees only its pooled vector.
        """
        if (known := self.known_texts.get(tuple(prompts))) is not None:
            return known.to(self.device)
        length = self.settings.text_length
        for prompt in dict.fromkeys(prompts):
            ids = self.pipeline.tokenizer_2(prompt, truncation=False, verbose=False).input_ids
            if len(ids) > length:
                cut = self.pipeline.tokenizer_2.decode(ids[length - 1 :], skip_special_tokens=True)
                log.warning("the base reads %d of this prompt's %d tokens; it does not see: %s", length, len(ids), cut)
        with truncating_quietly():
            tokens, pooled, _ = self.pipeline.encode_prompt(list(prompts), max_sequence_length=length)
        return Text(tokens.to(self.dtype), pooled.to(self.dtype))

    def remember_prompts(self, groups: Iterable[Sequence[str]]) -> None:
        """Encode lists of prompts now, so that `encode_prompts` needs no text encoders for them later."""
        self.known_texts |= {tuple(prompts): self.encode_prompts(prompts).to("cpu") for prompts in groups}

    def blank_text(self, count: int = 1) -> Text:
        """Text of the shapes that `encode_prompts` gives, not initialised, where the transformer is."""
        config = self.transformer.config

        def empty(*shape: int) -> Tensor:
            return torch.empty(count, *shape, device=self.device, dtype=self.dtype)

        return Text(empty(self.settings.text_length, config.joint_attention_dim), empty(config.pooled_projection_dim))

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Pictures `[B, 3, H, W]` in [0, 1] -> normalised latents `[B, C, H/8, W/8]` float32 (posterior mean)."""
        vae = self.pipeline.vae
        with called(vae):
            return (encode(vae, images).float() - vae.config.shift_factor) * vae.config.scaling_factor

    @torch.no_grad()
    def decode_latents(self, latents: Tensor, how: Decoding | None = None) -> Tensor:
        """Normalised latents `[B, C, h, w]` -> pictures `[B, 3, 8h, 8w]` float32 in [0, 1]."""
        with called(self.pipeline.vae):
            return decode(self.pipeline.vae, self._vae_latents(latents), how)

    @torch.no_grad()
    def decode_bands(self, latents: Tensor, how: Decoding) -> Iterator[tuple[int, Tensor]]:
        """One picture from normalised latents `[1, C, h, w]`, as `scale_dit.autoencoder.decode_bands` yields it."""
        with called(self.pipeline.vae):
            yield from decode_bands(self.pipeline.vae, self._vae_latents(latents), how)

    def _vae_latents(self, latents: Tensor) -> Tensor:
        """Normalised latents as the autoencoder takes them, where it is."""
        vae = self.pipeline.vae
        return (latents / vae.config.scaling_factor + vae.config.shift_factor).to(vae.device)

    @staticmethod
    def pack(latents: Tensor, order: Tensor) -> Tensor:
        """Latents `[B, C, 2h, 2w]` -> tokens `[B, h*w, 4C]` in the memory order `order`.

        Raises:
            ValueError: The order is for another number of tokens.
        """
        tokens = FluxPipeline._pack_latents(latents, *latents.shape)
        if tokens.shape[1] != len(order):
            raise ValueError(
                f"latents {list(latents.shape)} are {tokens.shape[1]} tokens, but the plan is for {len(order)}"
            )
        return tokens[:, order.to(tokens.device)]

    def unpack(self, tokens: Tensor, order: Tensor, height: int, width: int) -> Tensor:
        """Tokens in memory order -> latents `[B, C, 2*height, 2*width]`, sides in tokens."""
        raster = torch.empty_like(tokens)
        raster[:, order.to(tokens.device)] = tokens
        token_px = self.pipeline.vae_scale_factor * 2
        return FluxPipeline._unpack_latents(raster, height * token_px, width * token_px, self.pipeline.vae_scale_factor)

    @calls_transformer
    def guidance_pass(self, tokens: Tensor, pooled: Tensor, plan: Plan, guidance_scale: float) -> Sequence[KeysValues]:
        """Keys and values of the draft's tokens in every block: the base with the LoRA, at timestep 0.

        They depend on the draft and the pooled prompt alone, so one pass serves all steps and both branches of
        classifier-free guidance.

        Args:
            tokens: Clean draft tokens `[B, L, 4C]` in the memory order of `plan`.
            pooled: Pooled positive prompts `[B, P]`.
            guidance_scale: The embedded guidance scale of a distilled base; ignored by others.

        Returns:
            For each block, keys and values `[B, L, H, D]`.
        """
        with active_adapters(self.transformer, self.guidance_adapters):
            hidden = self.transformer.x_embedder(tokens.to(self.dtype))
        time = torch.zeros(len(tokens), device=tokens.device)
        embedding = self._time_embedding(time, guidance_scale, pooled)
        rotary = self._rotary(plan.guidance_ids, plan.method, hidden.device)
        no_text = hidden[:, :0]
        keys_values: list[KeysValues] = []
        *blocks, last = self._blocks
        for block in blocks:
            recorded: list[KeysValues] = []
            attention = BlockAttention(plan.guidance_layout, self.backend, recorded=recorded)
            _, hidden = self._run(block, self.guidance_adapters, hidden, no_text, embedding, rotary, attention)
            keys_values += recorded
        with called(last), active_adapters(last, self.guidance_adapters):
            keys_values.append(block_keys_values(last, hidden, embedding, rotary, fuses(self.backend)))
        return HostKeysValues(keys_values) if self.keys_values_on_host else keys_values

    @calls_transformer
    def image_pass(
        self,
        tokens: Tensor,
        text: Text,
        time: Tensor,
        plan: Plan,
        guidance: Sequence[KeysValues] | None,
        guidance_scale: float,
    ) -> Tensor:
        """Velocity of the image tokens: the base over text and image, reading the draft's keys and values.

        Args:
            tokens: Noisy tokens `[B, N, 4C]` in the memory order of `plan`.
            time: `[B]` in [0, 1], float32; 1 is pure noise.
            guidance: What `guidance_pass` returned, or `None` for a plan without guidance.

        Returns:
            `[B, N, 4C]`, in the memory order of `plan`.
        """
        transformer = self.transformer
        if text.tokens.shape[1] != plan.layout.text:
            raise UserError(f"{text.tokens.shape[1]} text tokens were given, but the plan is for {plan.layout.text}.")
        with active_adapters(transformer, self.image_adapters):
            image = transformer.x_embedder(tokens.to(self.dtype))
        embedding = self._time_embedding(time, guidance_scale, text.pooled)
        words = transformer.context_embedder(text.tokens.to(self.dtype))
        ids = torch.cat([plan.text_ids, plan.image_ids])
        rotary = self._rotary(ids, plan.method, image.device)
        for index, block in enumerate(self._blocks):
            block_guidance = guidance[index] if guidance is not None else None
            attention = BlockAttention(plan.layouts[index % 2], self.backend, block_guidance)
            words, image = self._run(block, self.image_adapters, image, words, embedding, rotary, attention)
        return transformer.proj_out(transformer.norm_out(image, embedding))

    @property
    def _blocks(self) -> list[nn.Module]:
        return [*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks]

    def _run(
        self,
        block: nn.Module,
        adapters: tuple[str, ...],
        image: Tensor,
        text: Tensor,
        embedding: Tensor,
        rotary: tuple[Tensor, Tensor],
        attention: BlockAttention,
    ) -> tuple[Tensor, Tensor]:
        """One block with the given adapters, also when it is recomputed in the backward pass."""

        def forward(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
            with active_adapters(block, adapters), chunked_feed_forward(block, self.feed_forward_tokens):
                return block(
                    hidden_states=image,
                    encoder_hidden_states=text,
                    temb=embedding,
                    image_rotary_emb=rotary,
                    joint_attention_kwargs={"block_attention": attention},
                )

        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(forward, image, text, use_reentrant=False)
        return forward(image, text)

    def _time_embedding(self, time: Tensor, guidance_scale: float, pooled: Tensor) -> Tensor:
        """Modulation vector `[B, C]`; time stays float32 until it is embedded (bfloat16 would round it to 1/256)."""
        embed = self.transformer.time_text_embed
        pooled = pooled.to(self.dtype)
        if self.transformer.config.guidance_embeds:
            scale = torch.full_like(time, guidance_scale)
            return embed(time.float() * 1000, scale.float() * 1000, pooled)
        return embed(time.float() * 1000, pooled)

    def _rotary(self, ids: Tensor, method: Method, device: torch.device) -> tuple[Tensor, Tensor]:
        embed = self.transformer.pos_embed
        if method.yarn != 1:
            length, factors = self.settings.native // self.settings.token_size, (1.0, method.yarn, method.yarn)
            return yarn_rotary(ids.to(device), embed.theta, embed.axes_dim, factors, length)
        if method.ntk == 1:
            return embed(ids.to(device))
        stretched = FluxPosEmbed(ntk_theta(embed.theta, method.ntk, max(embed.axes_dim)), embed.axes_dim)
        return stretched(ids.to(device))
