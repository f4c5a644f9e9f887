"""LoRA files of others: names of diffusers, peft and kohya, any layers, ranks and alphas of their own.

What a file holds is what the transformer gets, or an error says why not: diffusers' own loader leaves out what it does
not know.
"""

from __future__ import annotations

import json
import logging
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from scale_dit.errors import UserError
from scale_dit.lora import ADAPTER, DIFFUSERS_CONFIG, PREFIX, check_count, load_lora_state, open_lora, peft_config_file
from scale_dit.lora_fit import check_fit, layer_names
from scale_dit.lora_names import AuthorsLayers, LayerNames, bare_name, split_name

log = logging.getLogger(__name__)

TEXT_ENCODER = re.compile(r"^(text_encoder|lora_te)")
ALPHA = ".alpha"
MAY_BE_ZERO = re.compile(r"\.(diff|diff_b|bias)$")
"""Changes of biases and norms, which some trainers write although they did not train them."""


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

    def __post_init__(self) -> None:
        if self.adapter == ADAPTER:
            raise UserError(f"{ADAPTER!r} is the name of Scale-DiT's own LoRA: give the style {self.path} another name")
        if not self.adapter or hasattr(nn.ModuleDict(), self.adapter):
            raise UserError(
                f"a style cannot be named {self.adapter!r}, which torch uses itself: give {self.path} another name, as "
                f"in style_loras=[{{path: {self.path}, name: style}}]"
            )

    @property
    def adapter(self) -> str:
        """The adapter's name; peft allows no dots."""
        return str(self.name or Path(self.path).stem).replace(".", "_")


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


def read_foreign_lora(path: str | Path, authors_layers: AuthorsLayers, tell: bool = True) -> dict[str, Tensor]:
    """The transformer's part of a LoRA file, by peft's names (`x_embedder.lora_A.weight`), alphas worked in, float32.

    Args:
        authors_layers: The family's layers by the names of the authors' own code.
        tell: Whether to say what is left out: matrices for text encoders.

    Raises:
        UserError: Not readable, no LoRA, or of a kind that cannot be had.
    """
    tensors, metadata = open_lora(path)
    encoders = [name for name in tensors if TEXT_ENCODER.match(name)]
    if encoders and tell:
        log.warning("%s: %d tensors for text encoders are left out, such as %s", path, len(encoders), encoders[0])
    layers = _layers({name: tensor for name, tensor in tensors.items() if name not in encoders}, path)
    config, names = _config(path, metadata), LayerNames(authors_layers)
    found: dict[str, Tensor] = {}
    strange = []
    for layer, parts in layers.items():
        matrices = names.translate(layer, parts.get("A"), _scaled(layer, parts, config))
        if matrices is None:
            strange.append(layer)
        elif twice := found.keys() & matrices.keys():
            raise UserError(f"LoRA file {path} holds {min(twice)} twice, under different names")
        else:
            found |= matrices
    if strange and not found:
        raise UserError(
            f"LoRA file {path} is not one of this base's family, which has no layers of its names, such as {strange[0]}"
        )
    if strange:
        raise UserError(f"LoRA file {path} holds {len(strange)} layers of unknown names, such as {strange[0]}")
    if not found:
        raise UserError(f"LoRA file {path} holds nothing for the transformer")
    return found


def _layers(tensors: Mapping[str, Tensor], path: str | Path) -> dict[str, dict[str, Tensor]]:
    """Layer as the file names it -> its matrices `A` and `B` and, at times, its `alpha`."""
    layers: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    alphas, unlike = {}, []
    for name, tensor in tensors.items():
        found = split_name(name)
        if name.endswith(ALPHA) and tensor.numel() == 1:
            alphas[name.removesuffix(ALPHA)] = tensor
        elif found is not None and tensor.ndim == 2:
            layers[found[0]][found[1]] = tensor.float()
        elif tensor.count_nonzero() or not MAY_BE_ZERO.search(name):
            unlike.append(name)
    if unlike:
        raise UserError(
            f"LoRA file {path} holds {len(unlike)} tensors that are no LoRA matrices, such as {unlike[0]}: only "
            f"plain LoRA (lora_A and lora_B, lora_down and lora_up) can be loaded"
        )
    for layer in alphas.keys() & layers.keys():
        layers[layer]["alpha"] = alphas[layer]
    return dict(layers)


def _config(path: str | Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What diffusers keeps of the adapter's config in a file's metadata, or peft in a file beside it."""
    beside = peft_config_file(path)
    config = json.loads(metadata.get(DIFFUSERS_CONFIG) or (beside.read_text() if beside else "{}"))
    return {key.removeprefix(PREFIX): value for key, value in config.items()}


def _scaled(layer: str, parts: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensor | None:
    """B times alpha / rank, so that an adapter whose alpha is its rank does the same."""
    up = parts.get("B")
    if up is None:
        return None
    rank = up.shape[1]
    if "alpha" in parts:
        return up * (float(parts["alpha"]) / rank)
    if "lora_alpha" not in config:
        return up
    patterns = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(patterns.keys(), bare_name(layer)), config["lora_alpha"])
    return up * (alpha / (rank**0.5 if config.get("use_rslora") else rank))


def add_foreign_lora(transformer: Any, tensors: Mapping[str, Tensor], source: str, name: str) -> int:
    """Add a LoRA on whatever layers its tensors name, frozen and in the transformer's dtype.

    Args:
        tensors: As `read_foreign_lora` returns them.
        source: Where they come from, for errors.
        name: Of the adapter.

    Returns:
        The number of layers that it sits on.

    Raises:
        UserError: See `check_fit`; or a name that is taken.
    """
    if name in getattr(transformer, "peft_config", {}):
        raise UserError(f"there is a LoRA named {name!r} already: give another name, or unload it first")
    check_fit(transformer, tensors, source)
    layers = layer_names(tensors)
    ranks = {f"^{re.escape(layer)}": len(tensors[f"{layer}.lora_A.weight"]) for layer in layers}
    config = LoraConfig(
        r=next(iter(ranks.values())),
        target_modules="|".join(re.escape(layer) for layer in layers),
        rank_pattern=ranks,
        alpha_pattern=dict(ranks),
    )
    dtype = transformer.dtype
    transformer.add_adapter(config, adapter_name=name)
    load_lora_state(transformer, tensors, source, name)
    check_count(transformer, name, len(layers))
    own = re.compile(rf"\.lora_[AB]\.{re.escape(name)}\.")
    for key, parameter in transformer.named_parameters():
        if own.search(key):
            parameter.data = parameter.data.to(dtype)
    transformer.requires_grad_(False)
    return len(layers)


def set_weight(transformer: Any, name: str, weight: float) -> None:
    """Scale an adapter's update."""
    for layer in transformer.modules():
        if name in getattr(layer, "lora_A", {}):
            layer.set_scale(name, weight)
