"""What a base is, before any of its weights are loaded."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from scale_dit.errors import UserError

SETTINGS_FILE = "scale_dit.json"


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
        distilled: Guidance is an input of the transformer (FLUX.1-dev) instead of a second evaluation.
        steps: Default steps of the draft and of the refinement.
        lora: The LoRA that evaluation and generation use unless they are told otherwise.
    """

    name: str
    family: str = "scale_dit.models.flux1.Flux1"
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
        record = asdict(self) | {"path": "", "lora": None}
        (Path(folder) / SETTINGS_FILE).write_text(json.dumps(record, indent=2) + "\n")

    @classmethod
    def of(cls, path: str) -> BaseSettings:
        """The settings beside the weights in `path`; without such a file, those of FLUX.1."""
        record_path = Path(path) / SETTINGS_FILE
        if record_path.is_file():
            return cls(**json.loads(record_path.read_text()) | {"path": str(path)})
        return cls(name=Path(path).name, path=str(path))

    def check_weights(self) -> None:
        """Say that the weights are not here, before anything else is done.

        Raises:
            UserError: Neither a local folder nor a model in the local hub cache, and the hub cannot be reached or
                refuses; with the command that works without them.
        """
        if (Path(self.path) / "model_index.json").is_file():
            return
        from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

        try:
            if isinstance(try_to_load_from_cache(self.path, "model_index.json"), str):
                return
            # One request without retries, which a gated model refuses too. What an unreachable host raises depends on
            # the HTTP library underneath; their errors have no base class but this.
            get_hf_file_metadata(hf_hub_url(self.path, "model_index.json"), timeout=5)
        except Exception as reason:
            first_line = str(reason).strip().splitlines()[0] if str(reason).strip() else ""
            raise UserError(
                f"the weights of base {self.name!r} are neither in the folder {self.path!r} nor to be had from the "
                f"hub ({type(reason).__name__}: {first_line}). Give a local folder with base.path=/path/to/weights, "
                f"log in with `hf auth login` if the model is gated, or use the embedded base: add base=tiny to the "
                f"same command."
            ) from reason
