"""What a folder of weights says that it holds, held against the base that is asked for, before weights are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scale_dit.errors import UserError

if TYPE_CHECKING:
    from scale_dit.models.settings import BaseSettings

INDEX, CONFIG = "model_index.json", "transformer/config.json"
FLUX1, FLUX2 = "scale_dit.models.flux1.Flux1", "scale_dit.models.flux2.Flux2Klein"
FAMILY_OF_KIND = {"FluxTransformer2DModel": FLUX1, "Flux2Transformer2DModel": FLUX2}
"""Class of the transformer in diffusers -> family."""
SIZES = ("num_layers", "num_single_layers", "num_attention_heads", "attention_head_dim")


def transformer_config(path: str) -> dict[str, Any]:
    """The transformer's config in a folder of diffusers' format or of a hub id; `{}` for a folder without it.

    Raises:
        UserError: It is neither in the hub's local cache nor to be had from the hub.
    """
    if Path(path).is_dir():
        file = Path(path) / CONFIG
        return json.loads(file.read_text()) if file.is_file() else {}
    from huggingface_hub import hf_hub_download

    try:
        return json.loads(Path(hf_hub_download(path, CONFIG)).read_text())
    except OSError as error:
        raise UserError(
            f"{CONFIG} of {path} is neither in the hub's cache nor to be had from the hub ({type(error).__name__}): "
            "download the whole model once, or give a local folder with base.path=/path/to/weights"
        ) from error


def has_guidance_input(config: dict[str, Any]) -> bool:
    """Whether a transformer of this config takes the guidance scale as an input; without a config, as FLUX.1-dev."""
    return bool(config.get("guidance_embeds", config.get("_class_name") != "FluxTransformer2DModel"))


def check_folder(settings: BaseSettings) -> None:
    """Refuse a folder of another family, variant or size than its base.

    Families that this project does not know may have any.

    Raises:
        UserError: It is of another kind; with the bases that are of this one.
    """
    path = Path(settings.path)
    if not (path / INDEX).is_file():
        return
    index, config = json.loads((path / INDEX).read_text()), transformer_config(settings.path)
    kind = index.get("transformer", [None, None])[1]
    family = FAMILY_OF_KIND.get(kind)
    if family is None or settings.family not in FAMILY_OF_KIND.values():
        return
    if settings.family != family:
        raise _other(settings, f"holds a {kind}", _bases(kind))
    distilled = index.get("is_distilled")  # only FLUX.2-klein's index says it
    if distilled is not None and bool(distilled) != settings.distilled:
        fitting = [name for name in _bases(kind) if name.startswith("klein_base") != bool(distilled)]
        raise _other(settings, f"says is_distilled={bool(distilled)}", fitting)
    if settings.name not in _bases(kind) or not config:
        return
    embeds = has_guidance_input(config)
    if embeds != _sizes_of(settings.name)["guidance_embeds"]:
        fitting = [name for name in _bases(kind) if _sizes_of(name)["guidance_embeds"] == embeds]
        raise _other(settings, f"says guidance_embeds={embeds}", fitting)
    fitting = [name for name in _bases(kind) if all(_sizes_of(name)[size] == config.get(size) for size in SIZES)]
    if fitting and settings.name not in fitting:
        blocks = f"{config['num_layers']} and {config['num_single_layers']} blocks"
        width = config["num_attention_heads"] * config["attention_head_dim"]
        raise _other(settings, f"holds a {kind} of {blocks} of width {width}", fitting)


def _other(settings: BaseSettings, found: str, fitting: list[str]) -> UserError:
    return UserError(f"{settings.path} {found}, which base {settings.name!r} is not: use base={' or '.join(fitting)}")


def _bases(kind: str) -> list[str]:
    """Bases of the public configs whose transformer is of this class."""
    from scale_dit.models.shapes import SHAPES

    return [name for name, shape in SHAPES["full"].items() if shape["transformer"].kind == kind]


def _sizes_of(name: str) -> Any:
    from scale_dit.models.shapes import SHAPES

    return SHAPES["full"][name]["transformer"].sizes
