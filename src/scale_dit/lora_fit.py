"""Whether a LoRA fits a transformer: names and sizes tell, so one on `meta`, without weights, will do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from scale_dit.errors import UserError
from scale_dit.lora_targets import target_modules

Shapes = dict[str, tuple[int, ...]]
"""Sizes of matrices by peft's names (`x_embedder.lora_A.weight`)."""


def check_own_fit(transformer: Any, tensors: Mapping[str, Tensor], rank: int, source: str) -> None:
    """Refuse a LoRA of Scale-DiT's that is another base's: it must sit on exactly the layers that training adapts.

    Args:
        tensors: By peft's names.
        source: Where they come from, for the error.

    Raises:
        UserError: Matrices are missing, of unknown layers or of other sizes; named.
    """
    layers = _linear_layers(transformer)
    wanted = {name: rank for name in target_modules(transformer)}
    check_shapes(transformer, tensors, _shapes(layers, wanted), source)


def check_fit(transformer: Any, tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuse a LoRA that any layers may have, each of a rank of its own, but this transformer's.

    Args:
        tensors: By peft's names.
        source: Where they come from, for the error.

    Raises:
        UserError: Matrices of layers that the transformer lacks, of other sizes, or without the other of their pair.
    """
    layers = _linear_layers(transformer)
    wanted = {name: _rank(tensors, name) for name in layer_names(tensors) if name in layers}
    check_shapes(transformer, tensors, _shapes(layers, wanted), source)


def layer_names(tensors: Iterable[str]) -> list[str]:
    """The layers that matrices are for, by peft's names."""
    return list(dict.fromkeys(name.rsplit(".lora_", 1)[0] for name in tensors))


def check_shapes(transformer: Any, tensors: Mapping[str, Tensor], expected: Shapes, source: str) -> None:
    """Refuse matrices that are not of exactly these names and sizes.

    Raises:
        UserError: They are not; the first are named.
    """
    unknown = [name for name in tensors if name not in expected]
    missing = [name for name in expected if name not in tensors]
    other = [
        f"{name} is {list(tensors[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    kinds = (("unexpected", unknown), ("missing", missing), ("of another size", other))
    problems = [f"{len(names)} are {kind} ({_first(names)})" for kind, names in kinds if names]
    if problems:
        raise UserError(
            f"{source} does not fit this base, {_described(transformer)}. Of the matrices, {', '.join(problems)}. "
            f"Select the base that it was trained for (base=...), or a LoRA of this one."
        )


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _described(transformer: Any) -> str:
    double, single = len(transformer.transformer_blocks), len(transformer.single_transformer_blocks)
    width = _linear_layers(transformer)["x_embedder"].out_features
    return f"a {type(transformer).__name__} of {double} double and {single} single blocks of width {width}"


def _linear_layers(transformer: nn.Module) -> dict[str, nn.Linear]:
    """By their names without adapters."""
    return {
        name.replace(".base_layer", ""): module
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in name
    }


def _shapes(layers: Mapping[str, nn.Linear], ranks: Mapping[str, int]) -> Shapes:
    found: Shapes = {}
    for name, rank in ranks.items():
        found[f"{name}.lora_A.weight"] = (rank, layers[name].in_features)
        found[f"{name}.lora_B.weight"] = (layers[name].out_features, rank)
    return found


def _rank(tensors: Mapping[str, Tensor], name: str) -> int:
    down, up = (tensors.get(f"{name}.lora_{letter}.weight") for letter in "AB")
    sizes = down.shape[:1] if down is not None else up.shape[-1:] if up is not None else ()
    return max(1, *sizes) if sizes else 1
