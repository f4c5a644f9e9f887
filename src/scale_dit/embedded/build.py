"""Put together the embedded base: the component classes of FLUX.1, small, in a folder that stock diffusers loads."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

START, END = "<|startoftext|>", "<|endoftext|>"
SENTENCE_SPECIALS = ["<pad>", "</s>", "<unk>"]


@dataclass(frozen=True)
class TinyGeometry:
    """Sizes of the embedded base. The defaults give 16 px tokens and less than 32 MiB in bfloat16 in all.

    One token covers 16x16 px as in FLUX.1 (8x VAE, 2x2 packing), so 256 px are 16x16 tokens and every proportion of
    FLUX.1 at 1024 px (64x64 tokens, cell 8, window 16) is kept at a quarter: cell 2, window 4.
    """

    heads: int = 8
    head_dim: int = 32
    rope_axes: tuple[int, int, int] = (4, 14, 14)
    double_blocks: int = 2
    single_blocks: int = 6
    latent_channels: int = 16
    vae_channels: tuple[int, ...] = (32, 64, 96, 128)
    clip_width: int = 128
    clip_layers: int = 2
    t5_width: int = 192
    t5_layers: int = 3
    text_tokens: int = 64
    vocabulary: int = 640


def train_clip_tokenizer(captions: Iterable[str], geometry: TinyGeometry) -> CLIPTokenizer:
    """Byte-level BPE in CLIP's format, learnt from captions; every byte is in it, so any text can be encoded."""
    tokenizer = Tokenizer(models.BPE(unk_token=END, end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        # each byte stands twice: inside a word and, with the suffix, at its end
        vocab_size=geometry.vocabulary + 2 * len(alphabet),
        special_tokens=[START, END],
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
    )
    tokenizer.train_from_iterator((caption.replace(" ", "\n") for caption in captions), trainer)
    model = _model_state(tokenizer)
    vocabulary, merges = model["vocab"], [tuple(pair) for pair in model["merges"]]
    for byte in alphabet:
        vocabulary.setdefault(byte + "</w>", len(vocabulary))
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


def train_t5_tokenizer(captions: Iterable[str], geometry: TinyGeometry) -> T5TokenizerFast:
    """Unigram pieces in T5's format: the captions' words scored by their log frequency, then printable ASCII.

    The captions have a small closed vocabulary, which the unigram trainer would break into letters; whole words
    keep a caption of four objects within `geometry.text_tokens`. Single characters cost enough that they are used for
    unknown words only.
    """
    counts = Counter(word for caption in captions for word in caption.replace(",", " ,").replace(".", " .").split())
    total = sum(counts.values())
    pieces = [(special, 0.0) for special in SENTENCE_SPECIALS] + [("▁", -15.0)]
    pieces += [(f"▁{word}", math.log(count / total)) for word, count in counts.most_common(geometry.vocabulary)]
    pieces += [(mark, -4.0) for mark in ",."]
    pieces += [(chr(code), -15.0) for code in range(33, 127) if chr(code) not in ",."]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=geometry.text_tokens)


def _model_state(tokenizer: Tokenizer) -> dict:
    return json.loads(tokenizer.to_str())["model"]


def build_vae(geometry: TinyGeometry | None = None) -> AutoencoderKL:
    """A small AutoencoderKL with FLUX's latent format: 8x smaller, 16 channels, no quantisation convolutions."""
    geometry = geometry or TinyGeometry()
    stages = len(geometry.vae_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        block_out_channels=geometry.vae_channels,
        layers_per_block=1,
        latent_channels=geometry.latent_channels,
        norm_num_groups=16,
        sample_size=256,
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def build_text(captions: list[str], geometry: TinyGeometry | None = None) -> dict[str, Any]:
    """Tokenizers learnt from captions, and freshly initialised CLIP and T5 text encoders that fit them."""
    geometry = geometry or TinyGeometry()
    tokenizer = train_clip_tokenizer(captions, geometry)
    tokenizer_2 = train_t5_tokenizer(captions, geometry)
    clip = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=geometry.clip_width,
        intermediate_size=2 * geometry.clip_width,
        projection_dim=geometry.clip_width,
        num_hidden_layers=geometry.clip_layers,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    t5 = T5Config(
        vocab_size=len(tokenizer_2),
        d_model=geometry.t5_width,
        d_kv=32,
        d_ff=2 * geometry.t5_width,
        num_layers=geometry.t5_layers,
        num_heads=geometry.t5_width // 32,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        tie_word_embeddings=False,
    )
    return {
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer_2,
        "text_encoder": CLIPTextModel(clip),
        "text_encoder_2": T5EncoderModel(t5),
    }


def build_transformer(geometry: TinyGeometry | None = None) -> FluxTransformer2DModel:
    """A small FluxTransformer2DModel without guidance embedding (true classifier-free guidance)."""
    geometry = geometry or TinyGeometry()
    return FluxTransformer2DModel(
        in_channels=4 * geometry.latent_channels,
        num_layers=geometry.double_blocks,
        num_single_layers=geometry.single_blocks,
        attention_head_dim=geometry.head_dim,
        num_attention_heads=geometry.heads,
        joint_attention_dim=geometry.t5_width,
        pooled_projection_dim=geometry.clip_width,
        guidance_embeds=False,
        axes_dims_rope=geometry.rope_axes,
    )


def initialise_transformer(transformer: FluxTransformer2DModel) -> None:
    """Start as DiT does (Peebles and Xie 2023, section 3): Xavier weights, modulation and output layer at zero."""
    for module in transformer.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
    for name, module in transformer.named_modules():
        modulation = name.endswith((".norm.linear", ".norm1.linear", ".norm1_context.linear", "norm_out.linear"))
        if modulation or name == "proj_out":
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)


def save_pipeline(
    components: dict[str, Any], folder: str | Path, dtype: torch.dtype = torch.bfloat16, shift: float = 1.0
) -> Path:
    """Write the folder that `FluxPipeline.from_pretrained` reads, weights as safetensors in `dtype`.

    Args:
        components: Those of `FluxPipeline` but the scheduler; its modules are cast in place.
        folder: Where to.
        dtype: Of the weights.
        shift: Of the scheduler's noise levels.
    """
    pipeline = FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(shift=shift), **components)
    pipeline.to(dtype=dtype).save_pretrained(folder, safe_serialization=True)
    for name in ("text_encoder", "text_encoder_2", "transformer", "vae"):
        _tidy_config(Path(folder) / name / "config.json")
    return Path(folder)


def _tidy_config(path: Path) -> None:
    """Leave out the folder that a component was read from, and let all components load in one dtype.

    Without a dtype argument transformers loads in the stored dtype, diffusers in float32.
    """
    config = json.loads(path.read_text())
    config.pop("_name_or_path", None)
    if "dtype" in config:
        config["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2) + "\n")
