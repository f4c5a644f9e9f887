"""The LoRA that teaches the frozen base to offer the draft: where it sits, when it acts, and its file."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from scale_dit.errors import UserError
from scale_dit.lora_fit import check_own_fit, check_shapes
from scale_dit.lora_targets import target_modules

ADAPTER = "scale_dit"
PREFIX = "transformer."
FILE_NAME = "pytorch_lora_weights.safetensors"
PEFT_FILE_NAME, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
SCOPES = ("guidance", "all")

# What diffusers' own `save_lora_weights` calls the adapter's config in a file's metadata.
DIFFUSERS_CONFIG = "lora_adapter_metadata"
OWN_RECORD = "scale_dit"
RECORD_KEYS = ("base", "rank", "alpha", "lora_scope")


@dataclass(frozen=True)
class LoraSettings:
    """Size and reach of the LoRA.

    Args:
        rank: Rank of the update.
        alpha: The update is scaled by alpha / rank.
        scope: `guidance`: it acts on the guidance tokens alone (the paper); `all`: on the image pass too (ablation).
        path: File or folder of a trained one, for evaluation and generation; training starts a fresh one.
        base: Name of the base that it was trained for, of a file by others that does not say so.
    """

    rank: int = 16
    alpha: float = 16
    scope: str = "guidance"
    path: str | None = None
    base: str | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"LoRA rank is {self.rank}, but it must be at least 1: set lora.rank=16.")
        if self.scope not in SCOPES:
            raise UserError(f"Unknown LoRA scope {self.scope!r}: use one of {', '.join(SCOPES)}.")


def add_lora(transformer: Any, settings: LoraSettings, name: str = ADAPTER) -> list[nn.Parameter]:
    """Freeze the transformer and add a fresh LoRA (Gaussian A, zero B) in float32.

    Returns:
        The LoRA's parameters.
    """
    transformer.requires_grad_(False)
    targets = target_modules(transformer)
    transformer.add_adapter(_peft_config(settings, targets), adapter_name=name)
    check_count(transformer, name, len(targets))
    # In bfloat16 AdamW's updates of a LoRA would round away.
    cast_training_params(transformer, torch.float32)
    return [parameter for parameter in transformer.parameters() if parameter.requires_grad]


def _peft_config(settings: LoraSettings, targets: list[str]) -> LoraConfig:
    return LoraConfig(r=settings.rank, lora_alpha=settings.alpha, init_lora_weights="gaussian", target_modules=targets)


def check_count(transformer: Any, name: str, expected: int) -> None:
    """Make sure that an adapter sits on as many layers as it should: peft skips names that match none.

    Raises:
        RuntimeError: It does not.
    """
    found = sum(name in layer.lora_A for layer in _adapted_layers(transformer) if hasattr(layer, "lora_A"))
    if found != expected:
        raise RuntimeError(f"the LoRA {name!r} should sit on {expected} layers, but sits on {found}")


def _adapted_layers(module: nn.Module) -> list[BaseTunerLayer]:
    return [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]


@contextmanager
def active_adapters(module: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Let exactly the adapters `names` act inside `module`.

    PEFT's own `set_adapter` also switches `requires_grad`, which would cut the LoRA off between its two passes.
    """
    layers = _adapted_layers(module)
    before = [layer._active_adapter for layer in layers]
    for layer in layers:
        layer._active_adapter = list(names)
    try:
        yield
    finally:
        for layer, active in zip(layers, before, strict=True):
            layer._active_adapter = active


def remove_lora(transformer: Any, name: str = ADAPTER) -> None:
    """Take the LoRA off; if it was the only adapter, the transformer's modules and names are the stock ones again."""
    transformer.delete_adapters(name)
    if not getattr(transformer, "peft_config", None):
        transformer.unload_lora()


def lora_state(transformer: Any, name: str = ADAPTER) -> dict[str, Tensor]:
    """The LoRA's tensors by peft's names, such as `x_embedder.lora_A.weight`."""
    # peft's own function takes the adapters whose names merely contain this one, too.
    own = re.compile(rf"\.lora_([AB])\.{re.escape(name)}\.")
    return {own.sub(r".lora_\1.", key): value for key, value in transformer.state_dict().items() if own.search(key)}


def save_lora(
    transformer: Any,
    folder: str | Path,
    settings: LoraSettings,
    record: dict[str, Any],
    name: str = ADAPTER,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write the LoRA in diffusers' format, loadable by `FluxPipeline.load_lora_weights(folder)`.

    Args:
        record: What it was trained for: base, scale, window, pattern, anchors; checked when it is loaded here.

    Returns:
        The file's path.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {PREFIX + key: value.to(dtype).contiguous().cpu() for key, value in lora_state(transformer, name).items()}
    config = _peft_config(settings, target_modules(transformer)).to_dict()
    config["target_modules"] = sorted(config["target_modules"])
    metadata = {
        "format": "pt",
        DIFFUSERS_CONFIG: json.dumps(
            {PREFIX + key: value for key, value in config.items()}, default=str, sort_keys=True
        ),
        OWN_RECORD: json.dumps(record | {"rank": settings.rank, "alpha": settings.alpha, "lora_scope": settings.scope}),
    }
    path = folder / FILE_NAME
    partial = path.with_suffix(".partial")
    safetensors.torch.save_file(tensors, partial, metadata)
    partial.replace(path)
    return path


def file_digest(path: str | Path) -> str:
    """SHA-256 of a LoRA file, or of the one in a folder, and of the config that peft keeps beside it; shortened."""
    path = _file(path)
    config = peft_config_file(path)
    return hashlib.sha256(path.read_bytes() + (config.read_bytes() if config else b"")).hexdigest()[:12]


def _file(path: str | Path) -> Path:
    """The file in a folder, as diffusers or peft name it; a file itself."""
    path = Path(path)
    if not path.is_dir():
        return path
    return path / (
        PEFT_FILE_NAME if (path / PEFT_FILE_NAME).is_file() and not (path / FILE_NAME).exists() else FILE_NAME
    )


def peft_config_file(path: str | Path) -> Path | None:
    """Where peft keeps rank and alpha of the LoRA files that it writes."""
    file = _file(path)
    config = file.with_name(PEFT_CONFIG)
    return config if file.name == PEFT_FILE_NAME and config.is_file() else None


@contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    """A LoRA file, or the one in a folder, its tensors not read yet."""
    path = _file(path)
    if not path.is_file():
        raise UserError(
            f"LoRA file {path} does not exist; give a file or folder written by src/train.py (lora.path=...)."
        )
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            yield file
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(
            f"LoRA file {path} cannot be read ({error}): it is truncated or no safetensors file."
        ) from error


def open_lora(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a LoRA file, or of the folder that holds one, as they are.

    Raises:
        UserError: Missing or truncated.
    """
    with _opened(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118


def has_record(path: str | Path) -> bool:
    """Whether a LoRA file says what it was trained for, as this project's do.

    Raises:
        UserError: Missing or truncated.
    """
    with _opened(path) as file:
        return OWN_RECORD in (file.metadata() or {})


def read_lora(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (without the `transformer.` prefix) and record of a LoRA file, or of the folder that holds one.

    Raises:
        UserError: Missing, truncated, not a LoRA, or without the record that this project writes.
    """
    tensors, metadata = open_lora(path)
    foreign = [key for key in tensors if not key.startswith(PREFIX) or ".lora_" not in key]
    if foreign or not tensors:
        raise UserError(
            f"LoRA file {path} is not in diffusers' format: {len(foreign)} of {len(tensors)} keys do not look like "
            f"'transformer.<module>.lora_A.weight', for example {foreign[:3]}."
        )
    if OWN_RECORD not in metadata:
        raise UserError(
            f"LoRA file {path} was not written by Scale-DiT training (no '{OWN_RECORD}' record in its metadata), so "
            f"it cannot be known to which base and scale it belongs. Say for which base with lora.base=..., or train "
            f"one with src/train.py."
        )
    record = json.loads(metadata[OWN_RECORD])
    if lacking := [key for key in RECORD_KEYS if key not in record]:
        raise UserError(f"LoRA file {path} does not say its {', '.join(lacking)}: train it anew with src/train.py.")
    return {key.removeprefix(PREFIX): value for key, value in tensors.items()}, record


def check_record(record: dict[str, Any], base: str, method: dict[str, object]) -> list[str]:
    """Compare what a LoRA was trained for with what it is asked for.

    Returns:
        Differences in the method (a scale or window it was not trained for), as sentences: allowed, but worth
        a warning.

    Raises:
        UserError: It belongs to another base.
    """
    if record.get("base") != base:
        raise UserError(
            f"this LoRA was trained on base {record.get('base')!r}, but the base is {base!r}: select "
            f"base={record.get('base')}, or a LoRA of base {base!r}."
        )
    keys = [key for key in method if key in record and record[key] != method[key]]
    return [f"the LoRA was trained with {key}={record[key]}, now it is {method[key]}" for key in keys]


def load_lora(transformer: Any, path: str | Path, name: str = ADAPTER) -> tuple[LoraSettings, dict[str, Any]]:
    """Add the LoRA of a file to the transformer, frozen.

    Raises:
        UserError: See `read_lora` and `check_own_fit`; the transformer stays as it was.
    """
    tensors, record = read_lora(path)
    settings = LoraSettings(int(record["rank"]), float(record["alpha"]), str(record["lora_scope"]))
    check_own_fit(transformer, tensors, settings.rank, f"LoRA file {path}")
    add_lora(transformer, settings, name)
    load_lora_state(transformer, tensors, f"LoRA file {path}", name)
    transformer.requires_grad_(False)
    return settings, record


@torch.no_grad()
def load_lora_state(transformer: Any, tensors: Mapping[str, Tensor], source: str, name: str = ADAPTER) -> None:
    """Copy tensors named as `lora_state` names them into an adapter that is there already.

    Args:
        source: Where they come from, for the error.

    Raises:
        UserError: Keys are missing or unexpected, or shapes differ; named.
    """
    own = lora_state(transformer, name)
    check_shapes(transformer, tensors, {key: tuple(value.shape) for key, value in own.items()}, source)
    parameters = dict(transformer.named_parameters())
    for key, value in tensors.items():
        module, kind = key.rsplit(".lora_", 1)
        letter, rest = kind.split(".", 1)
        parameters[f"{module}.lora_{letter}.{name}.{rest}"].copy_(value)
