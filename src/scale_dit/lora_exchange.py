"""LoRA files of others: names of diffusers, peft and kohya, any layers, ranks and alphas of their own.

diffusers knows how the names of other trainers translate. Everything else is settled here, so that what a file holds is
what the transformer gets, or an error says why not: diffusers' own loader leaves out what it does not know.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from scale_dit.errors import UserError
from scale_dit.lora import DIFFUSERS_CONFIG, PREFIX, check_count, load_lora_state, open_lora, remove_lora

log = logging.getLogger(__name__)

OTHER_PREFIX = re.compile(r"^(base_model\.model\.|diffusion_model\.)+")
"""Where peft and some trainers write `transformer.`, or write it behind."""
OWN_NAMES = re.compile(
    r"(x_embedder|context_embedder|proj_out|norm_out|time_(text|guidance)_embed|"
    r"(double|single)_stream_modulation\w*\.linear|(single_)?transformer_blocks)\."
)
"""How names of a FLUX transformer's modules begin in diffusers, and none of the authors' own names does."""
OLD_SPELLING = re.compile(r"\.lora[._](down|up)\.")
UNLIKE_LORA = re.compile(r"dora_scale|lora_magnitude_vector|lokr_|hada_|oft_")
"""Other ways to adapt a layer. They are looked for before names are converted: diffusers leaves some out by itself."""
PAIR = re.compile(r"\.lora_([AB])(\.[^.]+)?\.weight$")
"""The end of a tensor's name, with the adapter's name in it or without."""


@dataclass(frozen=True)
class StyleLora:
    """A LoRA of a user's own beside Scale-DiT's: it acts on all tokens, in every pass.

    Args:
        path: File, or folder with one.
        weight: Factor on its update.
        name: Of the adapter; by default the file's.
    """

    path: str
    weight: float = 1.0
    name: str | None = None

    @property
    def adapter(self) -> str:
        """The adapter's name; peft allows no dots."""
        return (self.name or Path(self.path).stem).replace(".", "_")


def style_loras(entries: Sequence[Mapping[str, Any]]) -> list[StyleLora]:
    """Styles as a config lists them.

    Raises:
        UserError: An entry that is none, or two of one name.
    """
    found = []
    for entry in entries:
        if not isinstance(entry, Mapping) or not {"path"} <= entry.keys() <= {"path", "weight", "name"}:
            raise UserError(f"style_loras has {entry!r}, but an entry is {{path: file, weight: 0.8, name: style}}")
        weight = entry.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise UserError(f"the weight of style {entry['path']} is {weight!r}, but it must be a number")
        found.append(StyleLora(str(entry["path"]), float(weight), entry.get("name")))
    names = [style.adapter for style in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two styles are named {twice[0]!r}: give each its own name in style_loras")
    return found


def read_foreign_lora(path: str | Path, stock: Any) -> dict[str, Tensor]:
    """The transformer's part of a LoRA file, by peft's names (`x_embedder.lora_A.weight`), alphas worked in.

    Args:
        stock: The pipeline class of diffusers whose converters know the family.

    Raises:
        UserError: Not readable, no LoRA, or of a kind that cannot be had.
    """
    tensors, metadata = open_lora(path)
    if unlike := [name for name in tensors if UNLIKE_LORA.search(name)]:
        raise _not_plain(path, unlike)
    tensors = {_by_diffusers_names(name): tensor for name, tensor in tensors.items()}
    if not any(name.startswith(PREFIX) for name in tensors):
        tensors = _converted(tensors, path, stock)
    alphas = {
        name.removeprefix(PREFIX).removesuffix(".alpha"): float(tensor)
        for name, tensor in tensors.items()
        if name.endswith(".alpha")
    }
    others = [name for name in tensors if not name.startswith(PREFIX)]
    if strange := [name for name in others if not name.startswith("text_encoder")]:
        raise UserError(f"LoRA file {path} holds {len(strange)} tensors of unknown names, such as {strange[0]}")
    if others:
        log.warning("%s: %d tensors for text encoders are left out, such as %s", path, len(others), others[0])
    own = {
        PAIR.sub(r".lora_\1.weight", name.removeprefix(PREFIX)): tensor
        for name, tensor in tensors.items()
        if name.startswith(PREFIX) and not name.endswith(".alpha")
    }
    if unknown := [name for name in own if not PAIR.search(name)]:
        raise _not_plain(path, unknown)
    if not own:
        raise UserError(f"LoRA file {path} holds nothing for the transformer")
    config = {
        key.removeprefix(PREFIX): value for key, value in json.loads(metadata.get(DIFFUSERS_CONFIG, "{}")).items()
    }
    return {name: _scaled(name, own, alphas, config) for name in own}


def _not_plain(path: str | Path, names: Sequence[str]) -> UserError:
    return UserError(
        f"LoRA file {path} holds {len(names)} tensors that are no LoRA matrices, such as {names[0]}: only "
        f"plain LoRA (lora_A and lora_B, lora_down and lora_up) can be loaded"
    )


def _by_diffusers_names(name: str) -> str:
    """The name in diffusers, if it differs from it by no more than its beginning and the spelling of A and B."""
    bare = OTHER_PREFIX.sub("", name)
    if OWN_NAMES.match(bare):
        bare = PREFIX + bare
    if not bare.startswith(PREFIX):
        return name
    return OLD_SPELLING.sub(lambda found: ".lora_A." if found[1] == "down" else ".lora_B.", bare)


def _converted(tensors: dict[str, Tensor], path: str | Path, stock: Any) -> dict[str, Tensor]:
    """The same by diffusers' names; kohya's alphas are worked in by the converter."""
    try:
        found = stock.lora_state_dict(dict(tensors))
    except (ValueError, KeyError, IndexError, RuntimeError, NotImplementedError) as error:
        raise UserError(
            f"LoRA file {path} cannot be read: its names, such as {next(iter(tensors))}, are neither diffusers' nor "
            f"what {stock.__name__} can convert ({error})"
        ) from error
    if not any(name.startswith(PREFIX) for name in found):
        raise UserError(
            f"LoRA file {path} is not one of this base's family: its names, such as {next(iter(tensors))}, are not of "
            f"a {stock.__name__}"
        )
    return found


def _scaled(name: str, tensors: Mapping[str, Tensor], alphas: Mapping[str, float], config: Mapping[str, Any]) -> Tensor:
    """B times alpha / rank, so that an adapter whose alpha is its rank does the same; A as it is."""
    tensor = tensors[name].float()
    module, letter, _ = name.rsplit(".", 2)
    if letter == "lora_A" or tensor.ndim != 2:
        return tensor
    rank = tensor.shape[1]
    alpha = alphas.get(module)
    if alpha is None and "lora_alpha" in config:
        patterns = config.get("alpha_pattern") or {}
        alpha = patterns.get(get_pattern_key(patterns.keys(), module), config["lora_alpha"])
    return tensor if alpha is None else tensor * (alpha / (rank**0.5 if config.get("use_rslora") else rank))


def add_foreign_lora(transformer: Any, tensors: dict[str, Tensor], source: str, name: str) -> int:
    """Add a LoRA on whatever layers its tensors name, frozen and in the transformer's dtype.

    Args:
        tensors: As `read_foreign_lora` returns them.
        source: Where they come from, for errors.
        name: Of the adapter.

    Returns:
        The number of layers that it sits on.

    Raises:
        UserError: Layers that the transformer lacks, or of other sizes; a name that is taken.
    """
    if name in getattr(transformer, "peft_config", {}):
        raise UserError(f"there is a LoRA named {name!r} already: give another name, or unload it first")
    modules = sorted({key.rsplit(".lora_", 1)[0] for key in tensors})
    here = {
        key.replace(".base_layer", "") for key, module in transformer.named_modules() if isinstance(module, nn.Linear)
    }
    if lacking := [module for module in modules if module not in here]:
        raise UserError(
            f"{source} does not fit this base: it is for {len(lacking)} layers that the transformer lacks, such as "
            f"{lacking[0]}"
        )
    ranks = {
        f"^{re.escape(key.rsplit('.lora_', 1)[0])}": len(value) for key, value in tensors.items() if "lora_A" in key
    }
    config = LoraConfig(
        r=next(iter(ranks.values()), 1),
        target_modules="|".join(re.escape(module) for module in modules),
        rank_pattern=ranks,
        alpha_pattern=dict(ranks),
    )
    dtype = transformer.dtype
    transformer.add_adapter(config, adapter_name=name)
    try:
        load_lora_state(transformer, tensors, source, name)
        check_count(transformer, name, len(modules))
    except Exception:
        remove_lora(transformer, name)
        raise
    for key, parameter in transformer.named_parameters():
        if f".{name}." in key:
            parameter.data = parameter.data.to(dtype)
    transformer.requires_grad_(False)
    return len(modules)


def set_weight(transformer: Any, name: str, weight: float) -> None:
    """Scale an adapter's update."""
    for layer in transformer.modules():
        if name in getattr(layer, "lora_A", {}):
            layer.set_scale(name, weight)
