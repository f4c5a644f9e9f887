"""Small random bases: FLUX transformers by themselves, and the parts of a whole pipeline."""

from __future__ import annotations

import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn

from scale_dit.embedded.build import TinyGeometry
from scale_dit.lora import ADAPTER, LoraSettings, add_lora
from scale_dit.models.driver import Driver
from scale_dit.models.flux1 import Flux1
from scale_dit.models.flux2 import Flux2Klein
from scale_dit.models.settings import BaseSettings
from scale_dit.models.text import Text

GEOMETRY = TinyGeometry(
    heads=2,
    head_dim=16,
    rope_axes=(4, 6, 6),
    double_blocks=2,
    single_blocks=2,
    vae_channels=(16, 16, 32, 32),
    clip_width=32,
    clip_layers=1,
    t5_width=32,
    t5_layers=1,
    text_tokens=24,
    vocabulary=64,
)
SETTINGS = BaseSettings(
    name="small", cell=2, window=4, native=128, text_length=24, shift=1.0, guidance_scale=3.0, distilled=False, steps=2
)
CAPTIONS = [
    "a large red circle on sand",
    "a small blue star left of a green square, on a brick wall",
    "two yellow rings above a striped triangle",
]
SHAPES = {
    "small": {"layers": (2, 2), "heads": 2, "head_dim": 16, "axes": (4, 6, 6)},
    "tiny": {"layers": (2, 6), "heads": 8, "head_dim": 32, "axes": (4, 14, 14)},
    "wide_heads": {"layers": (2, 4), "heads": 2, "head_dim": 128, "axes": (16, 56, 56)},
    "distilled": {"layers": (2, 4), "heads": 2, "head_dim": 128, "axes": (16, 56, 56), "guidance_embeds": True},
}


def flux(shape: str = "small", seed: int = 1) -> FluxTransformer2DModel:
    """A random FLUX transformer of one of the `SHAPES`."""
    sizes = dict(SHAPES[shape])
    double, single = sizes["layers"]
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=double,
        num_single_layers=single,
        num_attention_heads=sizes["heads"],
        attention_head_dim=sizes["head_dim"],
        axes_dims_rope=sizes["axes"],
        guidance_embeds=sizes.get("guidance_embeds", False),
        joint_attention_dim=32,
        pooled_projection_dim=32,
    )
    randomise(transformer, seed)
    return transformer.eval().requires_grad_(False)


def randomise(module: nn.Module, seed: int) -> None:
    """Weights that let every path act: fresh modules have zero modulation, which hides most mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.data = noise * parameter.shape[1:].numel() ** -0.5
        else:
            parameter.data = 0.1 * noise + (1.0 if "norm_" in name and name.endswith("weight") else 0.0)


def drive(transformer: FluxTransformer2DModel, settings: BaseSettings = SETTINGS, **options) -> Flux1:
    """The driver over a transformer alone, without text encoders and autoencoder."""
    names = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    return Flux1(FluxPipeline(**dict.fromkeys(names), transformer=transformer), settings, **options)


def klein(heads: int = 2, axis: int = 4, layers: tuple[int, int] = (2, 2), seed: int = 1) -> Flux2Transformer2DModel:
    """A random FLUX.2-klein transformer."""
    transformer = Flux2Transformer2DModel(
        in_channels=128,
        num_layers=layers[0],
        num_single_layers=layers[1],
        num_attention_heads=heads,
        attention_head_dim=4 * axis,
        axes_dims_rope=(axis,) * 4,
        joint_attention_dim=48,
        guidance_embeds=False,
    )
    randomise(transformer, seed)
    return transformer.eval().requires_grad_(False)


def drive_klein(transformer: Flux2Transformer2DModel, settings: BaseSettings = SETTINGS, **options) -> Flux2Klein:
    """The driver over a FLUX.2 transformer alone."""
    names = ("scheduler", "vae", "text_encoder", "tokenizer")
    return Flux2Klein(Flux2KleinPipeline(**dict.fromkeys(names), transformer=transformer), settings, **options)


def add_random_lora(base: Driver, rank: int = 4, scope: str = "guidance", seed: int = 5) -> list[nn.Parameter]:
    """A LoRA that has an effect: a fresh one's B is zero."""
    parameters = add_lora(base.transformer, LoraSettings(rank, rank, scope))
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    base.guidance_adapters = (ADAPTER,)
    base.image_adapters = (ADAPTER,) if scope == "all" else ()
    return parameters


def random_text(
    count: int, transformer: FluxTransformer2DModel | Flux2Transformer2DModel, seed: int = 0, length: int = 24
) -> Text:
    """Text embeddings of no text at all."""
    generator = torch.Generator().manual_seed(seed)
    config = transformer.config
    return Text(
        torch.randn(count, length, config.joint_attention_dim, generator=generator),
        torch.randn(count, getattr(config, "pooled_projection_dim", 0), generator=generator),
    )


def noise(*shape: int, seed: int = 3) -> Tensor:
    """Standard normal numbers, the same ones for the same seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
