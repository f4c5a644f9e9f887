"""What a base is made of: its weights, its text and its pictures, without the transformer's passes."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, FluxPipeline
from torch import Tensor, nn

from scale_dit.autoencoder import Decoding, decode, decode_bands, encode
from scale_dit.lora_names import AuthorsLayers
from scale_dit.models.hooks import called
from scale_dit.models.settings import BaseSettings
from scale_dit.models.text import Text
from scale_dit.quiet import truncating_quietly

log = logging.getLogger(__name__)


class Parts(ABC):
    """A stock pipeline's transformer, text encoders and autoencoder.

    Attributes:
        known_texts: Prompts that were encoded ahead, in host memory.
    """

    stock: ClassVar[type[DiffusionPipeline]]
    """The family's pipeline in diffusers."""
    parts: ClassVar[tuple[str, ...]]
    """Names of the components that it is made of."""
    authors_layers: ClassVar[AuthorsLayers]
    """What the layers of its transformer are called in the authors' own code."""

    def __init__(self, pipeline: Any, settings: BaseSettings):
        self.pipeline, self.settings = pipeline, settings
        self.known_texts: dict[tuple[str, ...], Text] = {}

    @classmethod
    def stock_pipeline(cls, components: dict[str, Any], settings: BaseSettings) -> Any:
        """The stock pipeline over components that are there already."""
        return cls.stock(**{name: components[name] for name in cls.parts})

    @property
    def transformer(self) -> Any:
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

    @property
    def text_encoders(self) -> dict[str, nn.Module]:
        """Text encoders by name, unless they were dropped."""
        found = {name: self.pipeline.components[name] for name in self.parts if name.startswith("text_encoder")}
        return {name: encoder for name, encoder in found.items() if encoder is not None}

    def to(self, device: torch.device) -> None:
        """Move every module."""
        self.pipeline.to(device)

    def encoders_to(self, device: torch.device) -> None:
        """Move text encoders and autoencoder, and leave the transformer where it is."""
        for encoder in (*self.text_encoders.values(), self.pipeline.vae):
            encoder.to(device)

    def drop_text_encoders(self) -> dict[str, nn.Module]:
        """Only what `remember_prompts` encoded is known from now on; returns them, by name."""
        dropped = self.text_encoders
        self.pipeline.register_modules(**dict.fromkeys(dropped))
        return dropped

    def freeze(self) -> None:
        """No gradients, and evaluation mode, for every module."""
        for module in self.pipeline.components.values():
            if isinstance(module, nn.Module):
                module.requires_grad_(False).eval()

    @property
    def latent_channels(self) -> int:
        """Channels of the unpacked latents."""
        return self.transformer.config.in_channels // 4

    @abstractmethod
    def encode_text(self, prompts: list[str], length: int, device: torch.device | None = None) -> Text:
        """Encode prompts with the family's text encoders, `length` tokens each; see `encode_prompts`."""

    @abstractmethod
    def cut_text(self, prompt: str, length: int) -> tuple[int, str]:
        """How many tokens a prompt has, and the text that lies beyond the first `length`; empty if none does."""

    @property
    @abstractmethod
    def pooled_size(self) -> int:
        """Width of the pooled text; 0 for a family that has none."""

    @abstractmethod
    def normalise(self, latents: Tensor) -> Tensor:
        """The autoencoder's latents -> those of the transformer, `[B, C, h, w]`."""

    @abstractmethod
    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of `normalise`."""

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], device: torch.device | None = None) -> Text:
        """Encode prompts; text beyond `settings.text_length` tokens is cut with a warning.

        Args:
            device: Where the text encoders are, if not where everything is.
        """
        if (known := self.known_texts.get(tuple(prompts))) is not None:
            return known.to(self.device if device is None else device)
        length = self.settings.text_length
        for prompt in dict.fromkeys(prompts):
            count, cut = self.cut_text(prompt, length)
            if cut:
                log.warning("the base reads %d of this prompt's %d tokens; it does not see: %s", length, count, cut)
        with truncating_quietly():
            text = self.encode_text(list(prompts), length, device)
        return Text(text.tokens.to(self.dtype), text.pooled.to(self.dtype))

    def remember_prompts(self, groups: Iterable[Sequence[str]], device: torch.device | None = None) -> None:
        """Encode lists of prompts now, so that `encode_prompts` needs no text encoders for them later."""
        self.known_texts |= {tuple(prompts): self.encode_prompts(prompts, device).to("cpu") for prompts in groups}

    def blank_text(self, count: int = 1) -> Text:
        """Text of the shapes that `encode_prompts` gives, not initialised, where the transformer is."""

        def empty(*shape: int) -> Tensor:
            return torch.empty(count, *shape, device=self.device, dtype=self.dtype)

        width = self.transformer.config.joint_attention_dim
        return Text(empty(self.settings.text_length, width), empty(self.pooled_size))

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Pictures `[B, 3, H, W]` in [0, 1] -> normalised latents `[B, C, H/8, W/8]` float32 (posterior mean)."""
        vae = self.pipeline.vae
        with called(vae):
            return self.normalise(encode(vae, images).float())

    @torch.no_grad()
    def decode_latents(self, latents: Tensor, how: Decoding | None = None) -> Tensor:
        """Normalised latents `[B, C, h, w]` -> pictures `[B, 3, 8h, 8w]` float32 in [0, 1]."""
        vae = self.pipeline.vae
        with called(vae):
            return decode(vae, self.denormalise(latents).to(vae.device), how)

    def decoding_of(self, latents: Tensor, how: Decoding) -> Decoding:
        """How normalised latents `[1, C, h, w]` are decoded: `auto` is chosen, by what the device has free now."""
        vae = self.pipeline.vae
        with called(vae):
            return how.resolved(vae, latents.to(vae.device))

    @torch.no_grad()
    def decode_bands(self, latents: Tensor, how: Decoding) -> Iterator[tuple[int, Tensor]]:
        """One picture from normalised latents `[1, C, h, w]`, as `scale_dit.autoencoder.decode_bands` yields it."""
        vae = self.pipeline.vae
        with called(vae):
            yield from decode_bands(vae, self.denormalise(latents).to(vae.device), how)

    def noise(self, height: int, width: int, generator: torch.Generator) -> Tensor:
        """Noise `[1, C, 2*height, 2*width]`, sides in tokens, as the stock pipeline draws it."""
        shape = (1, self.latent_channels, 2 * height, 2 * width)
        return torch.randn(shape, generator=generator, device=generator.device)

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
