"""Sizes of the families' parts: full ones as in the public configs, and tiny ones that a test makes in a second."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import transformers
from torch import nn

from scale_dit.errors import UserError


@dataclass(frozen=True)
class Part:
    """A component of a pipeline that has weights.

    Args:
        library: `diffusers` or `transformers`.
        kind: Name of its class there.
        sizes: Arguments of the class, or of its config's.
    """

    library: str
    kind: str
    sizes: Mapping[str, Any]

    def resized(self, **sizes: Any) -> Part:
        """The same with other sizes."""
        return replace(self, sizes={**self.sizes, **sizes})

    def build(self) -> nn.Module:
        """The module, initialised as its class does."""
        if self.library == "diffusers":
            return getattr(diffusers, self.kind)(**self.sizes)
        model = getattr(transformers, self.kind)
        return model(model.config_class(**self.sizes))


Shape = Mapping[str, Part]
"""Parts by their names in the pipeline."""

STAGES = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}


def _flux1(blocks: tuple[int, int], heads: int, axes: tuple[int, int, int], guidance: bool, text: Shape) -> Shape:
    transformer = {
        "in_channels": 64, "num_layers": blocks[0], "num_single_layers": blocks[1], "num_attention_heads": heads,
        "attention_head_dim": sum(axes), "axes_dims_rope": axes, "guidance_embeds": guidance,
        "pooled_projection_dim": text["text_encoder"].sizes["hidden_size"],
        "joint_attention_dim": text["text_encoder_2"].sizes["d_model"],
    }  # fmt: skip
    return {"transformer": Part("diffusers", "FluxTransformer2DModel", transformer), "vae": FLUX1_VAE, **text}


def _flux2(blocks: tuple[int, int], heads: int, axis: int, text: Part) -> Shape:
    transformer = {
        "in_channels": 128, "num_layers": blocks[0], "num_single_layers": blocks[1], "num_attention_heads": heads,
        "attention_head_dim": 4 * axis, "axes_dims_rope": (axis,) * 4, "guidance_embeds": False,
        "joint_attention_dim": 3 * text.sizes["hidden_size"],
    }  # fmt: skip
    return {"transformer": Part("diffusers", "Flux2Transformer2DModel", transformer), "vae": FLUX2_VAE,
            "text_encoder": text}  # fmt: skip


FLUX1_VAE = Part("diffusers", "AutoencoderKL", {
    **STAGES, "latent_channels": 16, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
    "use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 0.3611, "shift_factor": 0.1159,
})  # fmt: skip
FLUX2_VAE = Part("diffusers", "AutoencoderKLFlux2", {
    **STAGES, "latent_channels": 32, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
})  # fmt: skip
TINY_VAE = {"block_out_channels": (16, 16, 32, 32), "layers_per_block": 1, "norm_num_groups": 16, "sample_size": 128}

CLIP = Part("transformers", "CLIPTextModel", {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "projection_dim": 768,
})  # fmt: skip
T5 = Part("transformers", "T5EncoderModel", {
    "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
})  # fmt: skip
QWEN_4B = Part("transformers", "Qwen3ForCausalLM", {
    "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
})  # fmt: skip
QWEN_8B = QWEN_4B.resized(hidden_size=4096, intermediate_size=12288, tie_word_embeddings=False)

# A tiny text encoder knows as many words as its tokenizer has.
TINY_CLIP = CLIP.resized(
    vocab_size=None, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, projection_dim=32
)
TINY_T5 = T5.resized(vocab_size=None, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
# The stock pipeline reads what is behind layers 9, 18 and 27.
TINY_QWEN = QWEN_4B.resized(
    vocab_size=None, hidden_size=16, intermediate_size=32, num_hidden_layers=28, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, max_position_embeddings=512,
)  # fmt: skip

FLUX1_TEXT: Shape = {"text_encoder": CLIP, "text_encoder_2": T5}
TINY_FLUX1_TEXT: Shape = {"text_encoder": TINY_CLIP, "text_encoder_2": TINY_T5}
KLEIN_4B = _flux2((5, 20), 24, 32, QWEN_4B)
KLEIN_9B = _flux2((8, 24), 32, 32, QWEN_8B)
TINY_KLEIN = {name: part.resized(**TINY_VAE) if name == "vae" else part
              for name, part in _flux2((2, 3), 2, 4, TINY_QWEN).items()}  # fmt: skip


def _tiny_flux1(guidance: bool) -> Shape:
    shape = _flux1((2, 3), 2, (4, 6, 6), guidance, TINY_FLUX1_TEXT)
    return {name: part.resized(**TINY_VAE) if name == "vae" else part for name, part in shape.items()}


SHAPES: dict[str, dict[str, Shape]] = {
    "full": {
        "flux1_dev": _flux1((19, 38), 24, (16, 56, 56), True, FLUX1_TEXT),
        "flux1_schnell": _flux1((19, 38), 24, (16, 56, 56), False, FLUX1_TEXT),
        "klein_4b": KLEIN_4B, "klein_base_4b": KLEIN_4B, "klein_9b": KLEIN_9B, "klein_base_9b": KLEIN_9B,
    },
    "tiny": {
        "flux1_dev": _tiny_flux1(True), "flux1_schnell": _tiny_flux1(False),
        "klein_4b": TINY_KLEIN, "klein_base_4b": TINY_KLEIN, "klein_9b": TINY_KLEIN, "klein_base_9b": TINY_KLEIN,
    },
}  # fmt: skip
"""Size -> base -> its parts."""


def shape_of(base: str, size: str) -> Shape:
    """The parts of a base.

    Raises:
        UserError: An unknown base or size.
    """
    if size not in SHAPES:
        raise UserError(f"unknown size {size!r}: use one of {', '.join(SHAPES)}")
    if base not in SHAPES[size]:
        raise UserError(f"there are no random weights for base {base!r}: use one of {', '.join(SHAPES[size])}")
    return SHAPES[size][base]
