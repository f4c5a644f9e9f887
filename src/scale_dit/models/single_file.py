"""A transformer in one `.safetensors` file, as such models are often passed on; all else is the base's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import diffusers
import safetensors
import torch
from diffusers import DiffusionPipeline

from scale_dit.errors import UserError
from scale_dit.models.settings import BaseSettings
from scale_dit.models.weights_folder import FAMILY_OF_KIND, has_guidance_input, transformer_config

INPUT_NAMES = {"picture": ("x_embedder", "img_in"), "text": ("context_embedder", "txt_in")}
BLOCK_NAMES = {
    "num_layers": ("transformer_blocks", "double_blocks"),
    "num_single_layers": ("single_transformer_blocks", "single_blocks"),
}
"""Layers by the names of diffusers and of the authors' code."""
GUIDANCE = re.compile(r"(?:^|\.)(?:guidance_embedder|guidance_in)\.")
INPUTS = re.compile(r"(?:^|\.)(x_embedder|img_in|context_embedder|txt_in)\.weight$")


def transformer_of(settings: BaseSettings, dtype: torch.dtype) -> dict[str, Any]:
    """`{"transformer": ...}` from `settings.transformer_file`, of the sizes that the base has; `{}` without a file.

    Keys may be diffusers' or the original ones, which diffusers converts.

    Raises:
        UserError: The file does not hold all the weights of this base's transformer.
    """
    if settings.transformer_file is None:
        return {}
    _, kind = DiffusionPipeline.load_config(settings.path)["transformer"]
    model = getattr(diffusers, kind)
    try:
        transformer = model.from_single_file(
            settings.transformer_file, config=settings.path, subfolder="transformer", torch_dtype=dtype
        )
    except (ValueError, KeyError, RuntimeError, IndexError) as error:
        raise _does_not_fit(settings, kind, str(error)) from error
    # A file of another model of the same family may lack layers, which then stay where they were built.
    lacking = [name for name, parameter in transformer.named_parameters() if parameter.device.type == "meta"]
    if lacking:
        raise _does_not_fit(settings, kind, f"it lacks {len(lacking)} weights, such as {lacking[0]}")
    return {"transformer": transformer}


def check_transformer_file(file: str | None) -> None:
    """Refuse what cannot be a transformer's weights, by the file's first bytes.

    Raises:
        UserError: No such file, or no safetensors file.
    """
    if file is None:
        return
    path = Path(file)
    if not path.is_file():
        raise UserError(f"base.transformer_file={file} does not exist: give the .safetensors file of a transformer")
    try:
        with safetensors.safe_open(path, framework="pt") as opened:
            empty = not opened.keys()
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(
            f"base.transformer_file={file} cannot be read ({error}): it is truncated or no safetensors file"
        ) from error
    if empty:
        raise UserError(f"base.transformer_file={file} holds no weights")


def check_fit(settings: BaseSettings) -> None:
    """Hold the names and shapes of `settings.transformer_file` against the transformer's config, weights unread.

    Transformers of families that this project does not know are not looked into.

    Raises:
        UserError: It is of another family, or of another size.
    """
    if settings.transformer_file is None:
        return
    config = transformer_config(settings.path)
    kind = config.get("_class_name")
    if kind not in FAMILY_OF_KIND:
        return
    with safetensors.safe_open(settings.transformer_file, framework="pt") as opened:
        names = list(opened.keys())
        shapes = {name: opened.get_slice(name).get_shape() for name in names if INPUTS.search(name)}
    width = config["num_attention_heads"] * config["attention_head_dim"]
    wanted = {"picture": [width, config["in_channels"]], "text": [width, config["joint_attention_dim"]]}
    for input_of, (inner, outer) in INPUT_NAMES.items():
        found = [shape for name, shape in shapes.items() if name.split(".")[-2] in (inner, outer)]
        if wanted[input_of] not in found:
            said = f"of {found[0]}" if found else "missing"
            raise _does_not_fit(settings, kind, f"the {input_of}'s input layer is {said}, not of {wanted[input_of]}")
    if any(map(GUIDANCE.search, names)) != has_guidance_input(config):
        raise _does_not_fit(settings, kind, f"guidance is {'no' if has_guidance_input(config) else 'an'} input of it")
    for blocks, (inner, outer) in BLOCK_NAMES.items():
        numbers = re.findall(rf"(?:^|\.)(?:{inner}|{outer})\.(\d+)\.", "\n".join(names), re.MULTILINE)
        if (found_blocks := len(set(numbers))) != config[blocks]:
            raise _does_not_fit(settings, kind, f"it has {found_blocks} {outer}, not {config[blocks]}")


def _does_not_fit(settings: BaseSettings, kind: str, reason: str) -> UserError:
    first_line = reason.strip().splitlines()[0] if reason.strip() else "unknown keys"
    return UserError(
        f"base.transformer_file={settings.transformer_file} does not fit base {settings.name!r}, whose transformer is "
        f"a {kind}: {first_line}. Select the base that it was made from (base=...)."
    )
