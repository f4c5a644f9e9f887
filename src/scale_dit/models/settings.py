"""What a base is, before any of its weights are loaded."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scale_dit.errors import UserError
from scale_dit.models.weights_folder import (
    FLUX1,
    FLUX2,
    INDEX,
    check_folder,
    has_guidance_input,
    transformer_config,
)

SETTINGS_FILE = "scale_dit.json"
NAMES = {
    "FLUX.1-dev": "flux1_dev",
    "FLUX.1-schnell": "flux1_schnell",
    "FLUX.2-klein-4B": "klein_4b",
    "FLUX.2-klein-9B": "klein_9b",
    "FLUX.2-klein-base-4B": "klein_base_4b",
    "FLUX.2-klein-base-9B": "klein_base_9b",
}
"""The last part of a hub id -> the base's name in `configs/base`."""
SCHNELL = {"shift": 1.0, "text_length": 256, "guidance_scale": 1.0, "steps": 4}
KLEIN = {"family": FLUX2}
KLEIN_DISTILLED = KLEIN | {"shift": 9.9, "guidance_scale": 1.0, "steps": 4}
KLEIN_BASE = KLEIN | {"shift": 7.6, "guidance_scale": 4.0, "steps": 50, "distilled": False}


def check_guidance_scale(name: str, value: object) -> None:
    """Refuse what is no guidance scale.

    Raises:
        UserError: Not a finite number of at least 0.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise UserError(f"{name} is {value!r}, but it must be a number of at least 0 (1: no guidance)")


@dataclass(frozen=True)
class BaseSettings:
    """Geometry and sampling constants of a base model. The defaults are those of FLUX.1.

    Args:
        name: As users select it (`base=<name>`), and as LoRA files record it.
        family: Class path of the driver in `scale_dit.models`.
        path: Folder in diffusers' format, or hub id.
        token_size: Side in px that one token covers.
        cell: Side in tokens of a cell.
        window: Side in tokens of a window.
        native: Side in px that the base was trained at.
        text_length: Text tokens that the transformer reads.
        shift: Constant shift of the noise schedule (Esser et al. 2024, section 5.3.2).
        training_shift: Shift of the noise levels at which the base and its LoRA are trained; 1 is none (the paper).
        training_spread: Standard deviation of those levels' normal; 1 is the paper's.
        guidance_scale: Default guidance scale of drafts, and of pictures that read none.
        refine_guidance_scale: Default of a refinement that reads its draft; `None` is `guidance_scale`.
        distilled: Guidance is no second evaluation but an input of the transformer (FLUX.1-dev), or there is none.
        steps: Default steps of the draft and of the refinement.
        lora: The LoRA that evaluation and generation use unless they are told otherwise.
        transformer_file: A `.safetensors` file of the transformer, to use instead of the one in `path`.
    """

    name: str
    family: str = FLUX1
    path: str = ""
    token_size: int = 16
    cell: int = 8
    window: int = 16
    native: int = 1024
    text_length: int = 512
    shift: float = 3.0
    training_shift: float = 1.0
    training_spread: float = 1.0
    guidance_scale: float = 3.5
    refine_guidance_scale: float | None = None
    distilled: bool = True
    steps: int = 28
    lora: str | None = None
    transformer_file: str | None = None

    def __post_init__(self) -> None:
        for name in ("training_shift", "training_spread"):
            if not getattr(self, name) > 0:
                raise UserError(
                    f"base.{name} is {getattr(self, name)}, but it must be positive (1: the paper's levels)"
                )
        check_guidance_scale("base.guidance_scale", self.guidance_scale)
        if self.refine_guidance_scale is not None:
            check_guidance_scale("base.refine_guidance_scale", self.refine_guidance_scale)

    def guidance_scale_for(self, given: float | None, reads_draft: bool) -> float:
        """The guidance scale of a stage: the one given, else the base's for pictures that read a draft or do not."""
        if given is not None:
            return given
        refining = self.refine_guidance_scale if reads_draft else None
        return self.guidance_scale if refining is None else refining

    def has_negative_branch(self, *guidance_scales: float) -> bool:
        """Whether any of these scales asks for the second branch of classifier-free guidance."""
        return not self.distilled and any(scale != 1 for scale in guidance_scales)

    def save(self, folder: str | Path) -> None:
        """Write the settings beside a base's weights, so that a pipeline can be loaded from the folder alone."""
        record = asdict(self) | {"path": "", "lora": None, "transformer_file": None}
        (Path(folder) / SETTINGS_FILE).write_text(json.dumps(record, indent=2) + "\n")

    @classmethod
    def of(cls, path: str) -> BaseSettings:
        """The settings beside the weights in `path`; without such a file, those of the family that they are of.

        Raises:
            UserError: The weights cannot be had.
        """
        record_path = Path(path) / SETTINGS_FILE
        if record_path.is_file():
            return cls(**json.loads(record_path.read_text()) | {"path": str(path)})
        name = NAMES.get(Path(path).name, Path(path).name)
        cls(name=name, path=path)._check_there()
        from diffusers import DiffusionPipeline

        index = DiffusionPipeline.load_config(path)
        distilled, embeds = bool(index.get("is_distilled")), has_guidance_input(transformer_config(path))
        return cls.of_kind(index["transformer"][1], name, distilled, embeds, str(path))

    @classmethod
    def of_kind(
        cls, kind: str, name: str, distilled: bool = False, guidance_embeds: bool = True, path: str = ""
    ) -> BaseSettings:
        """The settings of a family, by the class of its transformer in diffusers.

        Args:
            distilled: FLUX.2-klein: without classifier-free guidance.
            guidance_embeds: FLUX.1: the guidance scale is an input, as FLUX.1-dev has it and FLUX.1-schnell has not.
        """
        own: dict[str, Any] = {} if guidance_embeds else SCHNELL
        if kind == "Flux2Transformer2DModel":
            own = KLEIN_DISTILLED if distilled else KLEIN_BASE
        return cls(name=name, path=path, **own)

    def check_weights(self) -> None:
        """Say that the weights are not here or of another kind, before anything else is done.

        Raises:
            UserError: Neither a local folder nor a model in the local hub cache, and the hub cannot be reached or
                refuses; with the command that works without them. Or a folder of another family, variant or size, or a
                `transformer_file` that is none or another's.
        """
        from scale_dit.models.single_file import check_fit

        named = NAMES.get(Path(self.path).name, self.name)
        may_be_hub_id = len(Path(self.path).parts) == 2 and not Path(self.path).exists()
        if may_be_hub_id and named != self.name and self.name in NAMES.values():
            raise UserError(f"{self.path} is base={named}, not base={self.name}: change one of base and base.path")
        self._check_there()
        check_folder(self)
        check_fit(self)

    def _check_there(self) -> None:
        from scale_dit.models.single_file import check_transformer_file

        check_transformer_file(self.transformer_file)
        if (Path(self.path) / INDEX).is_file():
            return
        if Path(self.path).is_file():
            raise UserError(
                f"base.path={self.path} is a file, but a base is a folder in diffusers' format or a hub id: give a "
                f"transformer that came as one file with base.transformer_file={self.path}, and leave out base.path, "
                "or give the folder that everything else comes from"
            )
        from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

        try:
            if isinstance(try_to_load_from_cache(self.path, INDEX), str):
                return
            # One request without retries, which a gated model refuses too. What an unreachable host raises depends on
            # the HTTP library underneath; their errors have no base class but this.
            get_hf_file_metadata(hf_hub_url(self.path, INDEX), timeout=5)
        except Exception as reason:
            remedy = "use the embedded base: add base=tiny to the same command"
            if self.name == "tiny":
                remedy = "give that of a checkout of the project: paths.assets_dir=<checkout>/assets"
            first_line = str(reason).strip().splitlines()[0] if str(reason).strip() else ""
            raise UserError(
                f"the weights of base {self.name!r} are neither in the folder {self.path!r} nor to be had from the "
                f"hub ({type(reason).__name__}: {first_line}). Give a local folder with base.path=/path/to/weights, "
                f"log in with `hf auth login` if the model is gated, or {remedy}."
            ) from reason
