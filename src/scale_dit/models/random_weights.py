"""Bases with random weights in the real format: what they cost, and that they run, does not depend on what they know.

    python -m scale_dit.models.random_weights base=klein_4b size=tiny out=klein

Tiny ones are made in a second, on a CPU. Full ones have the sizes of the public configs, and are for a GPU.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import FlowMatchEulerDiscreteScheduler
from omegaconf import OmegaConf
from torch import nn

from scale_dit.errors import UserError
from scale_dit.models import load_family
from scale_dit.models.settings import BaseSettings
from scale_dit.models.shapes import Part, Shape, shape_of
from scale_dit.models.small_tokenizers import small_tokenizers
from scale_dit.pipeline import ScaleDiTPipeline
from scale_dit.provenance import project_root

log = logging.getLogger(__name__)

TINY = {"cell": 2, "window": 4, "native": 128, "text_length": 48, "steps": 2}
"""Geometry of tiny bases; everything else is the base's own."""
VOCABULARIES = {"CLIPTextModel": "tokenizer", "T5EncoderModel": "tokenizer_2", "Qwen3ForCausalLM": "tokenizer"}


def base_settings(name: str, size: str = "full", path: str = "") -> BaseSettings:
    """The settings of a base in `configs/base`, tiny where its weights are.

    Raises:
        UserError: An unknown base or size.
    """
    shape_of(name, size)
    config: Any = OmegaConf.load(project_root() / "configs" / "base" / f"{name}.yaml")
    values = {key: value for key, value in config.items() if key != "_target_"}
    return BaseSettings(**(values | (TINY if size == "tiny" else {}) | {"path": path}))


def random_part(
    part: Part,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    draw_on: str | torch.device | None = None,
    seed: int = 0,
) -> Any:
    """One component on `device`, in evaluation mode and frozen; never there twice, nor in float32.

    Args:
        draw_on: Where numbers are drawn; by default on `device`. A GPU fills host memory much faster than the CPU does.
    """
    with init_empty_weights(include_buffers=False):
        module: Any = part.build()
    draw_on = torch.device(device if draw_on is None else draw_on)
    generator = torch.Generator(draw_on).manual_seed(seed)
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            number = _numbers(name, parameter, dtype, draw_on, generator)
            setattr(owner, name, nn.Parameter(number.to(device), requires_grad=False))
        if isinstance(owner, nn.BatchNorm2d) and owner.running_mean is not None and owner.running_var is not None:
            # FLUX.2's autoencoder norms latents by these: not by nothing.
            owner.running_mean.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(seed))
            owner.running_var.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(seed + 1))
    if hasattr(module, "tie_weights"):
        module.tie_weights()
    return module.to(device).eval()


def _numbers(
    name: str, parameter: nn.Parameter, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> torch.Tensor:
    """Linear maps that keep lengths, so that numbers stay finite; norms and biases that every path can be told by."""
    number = torch.empty(parameter.shape, dtype=dtype, device=device)
    if parameter.ndim > 1:
        return number.normal_(std=parameter.shape[1:].numel() ** -0.5, generator=generator)
    return number.normal_(1.0 if name == "weight" else 0.0, 0.1, generator=generator)


def random_components(
    shape: Shape,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    draw_on: str | torch.device | None = None,
    seed: int = 0,
    text: bool = True,
) -> dict[str, Any]:
    """All components of a stock pipeline.

    Args:
        text: With text encoders; without, prompts cannot be encoded.
    """
    tokenizers = small_tokenizers({part.kind for part in shape.values()})
    components: dict[str, Any] = {"scheduler": FlowMatchEulerDiscreteScheduler(), **tokenizers}
    for name, part in shape.items():
        if not text and name.startswith("text_encoder"):
            components[name] = None
        else:
            components[name] = random_part(_fit(part, tokenizers), device, dtype, draw_on, seed)
    return components


def fitted(shape: Shape) -> Shape:
    """The shape in which a vocabulary that is open is that of the tiny tokenizers."""
    tokenizers = small_tokenizers({part.kind for part in shape.values()})
    return {name: _fit(part, tokenizers) for name, part in shape.items()}


def _fit(part: Part, tokenizers: Mapping[str, Any]) -> Part:
    """A text encoder that knows the ends that its tokenizer gives, and, where its shape is open, its vocabulary."""
    if part.kind not in VOCABULARIES:
        return part
    tokenizer = tokenizers[VOCABULARIES[part.kind]]
    vocabulary = {"vocab_size": len(tokenizer)} if part.sizes.get("vocab_size", 0) is None else {}
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return part.resized(**vocabulary, **{name: end for name, end in ends.items() if end is not None})


def random_pipeline(
    settings: BaseSettings,
    size: str = "full",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    draw_on: str | torch.device | None = None,
    backend: str = "auto",
    text: bool = True,
) -> ScaleDiTPipeline:
    """A whole pipeline that was never on disk.

    Raises:
        UserError: There are no sizes for the base `settings.name`.
    """
    components = random_components(shape_of(settings.name, size), device, dtype, draw_on, text=text)
    pipeline = ScaleDiTPipeline(**components, is_distilled=settings.distilled)
    pipeline.configure(settings, backend)
    return pipeline


def on_meta(shape: Shape, **transformer_sizes: Any) -> dict[str, Any]:
    """All components without weights, on `meta`, with other sizes of the transformer where they are given."""
    with torch.device("meta"):
        return {
            name: (part.resized(**transformer_sizes) if name == "transformer" else part).build()
            for name, part in shape.items()
        }


def write_configs(name: str, folder: Path) -> BaseSettings:
    """The folder of a full base without its weights: what a plan is made from."""
    shape = shape_of(name, "full")
    for part, module in on_meta(shape).items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        if shape[part].library == "transformers":
            module.config.save_pretrained(folder / part)
        else:
            module.save_config(folder / part)
    settings = base_settings(name, path=str(folder))
    index = {part: (shape[part].library, shape[part].kind) for part in shape}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": load_family(settings).stock.__name__} | index))
    return settings


def write_base(
    name: str,
    folder: str | Path,
    size: str = "tiny",
    dtype: torch.dtype = torch.bfloat16,
    draw_on: str | torch.device | None = None,
    seed: int = 0,
) -> BaseSettings:
    """Write the folder that the stock pipeline's `from_pretrained` reads, with the base's settings beside it.

    Raises:
        UserError: An unknown base or size.
    """
    settings = base_settings(name, size, str(folder))
    components = random_components(shape_of(name, size), dtype=dtype, draw_on=draw_on, seed=seed)
    components["scheduler"] = FlowMatchEulerDiscreteScheduler(shift=settings.shift)
    load_family(settings).stock_pipeline(components, settings).save_pretrained(folder)
    settings.save(folder)
    return settings


def main(arguments: Sequence[str]) -> None:
    """`base=... size=... out=...`; also `dtype=` and `seed=`.

    Raises:
        UserError: An unknown or missing argument, base or size.
    """
    given = dict(argument.partition("=")[::2] for argument in arguments)
    known = {"base": "klein_4b", "size": "tiny", "out": "", "dtype": "bfloat16", "seed": "0"}
    if unknown := sorted(given.keys() - known.keys()):
        raise UserError(f"unknown arguments {', '.join(unknown)}: use {', '.join(known)}, as in base=klein_4b")
    options = known | given
    dtype = getattr(torch, options["dtype"], None)
    if not options["out"] or not isinstance(dtype, torch.dtype) or not options["seed"].isdecimal():
        raise UserError("give a folder with out=/path/to/base, a dtype such as float32 and a seed of 0 or more")
    draw_on = "cuda" if torch.cuda.is_available() else "cpu"
    settings = write_base(options["base"], options["out"], options["size"], dtype, draw_on, int(options["seed"]))
    log.info("%s with random weights is in %s: use base.path=%s", settings.name, settings.path, settings.path)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"Error: {error}")
