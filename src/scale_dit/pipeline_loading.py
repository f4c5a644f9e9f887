"""What a pipeline is made of: loading a base in diffusers' format, its geometry, and the LoRA."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import DiffusionPipeline

from scale_dit.autoencoder import Decoding
from scale_dit.method import Method
from scale_dit.models import load_family
from scale_dit.models.driver import Driver
from scale_dit.models.settings import BaseSettings
from scale_dit.models.single_file import transformer_of
from scale_dit.models.weights_folder import has_guidance_input
from scale_dit.pipeline_adapters import Adapters

log = logging.getLogger(__name__)


class LoadedPipeline(Adapters, DiffusionPipeline):
    """The components of the base's stock pipeline, unmodified, with the driver over them and, at times, LoRAs."""

    model_cpu_offload_seq = "text_encoder->text_encoder_2->transformer->vae"
    _optional_components = ["text_encoder_2", "tokenizer_2", "image_encoder", "feature_extractor"]  # noqa: RUF012
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012

    def __init__(
        self,
        scheduler: Any,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        transformer: Any,
        text_encoder_2: Any = None,
        tokenizer_2: Any = None,
        image_encoder: Any = None,
        feature_extractor: Any = None,
        is_distilled: bool = False,
    ):
        super().__init__()
        self.register_to_config(is_distilled=is_distilled)
        self.register_modules(
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            transformer=transformer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
        )
        self.method = Method()
        self.decoding = Decoding()
        self._no_adapters()
        self.base: Driver = None  # type: ignore[assignment]
        kind = type(transformer).__name__
        config = {} if transformer is None else dict(transformer.config)
        self.configure(BaseSettings.of_kind(kind, kind, is_distilled, has_guidance_input(config)))

    @classmethod
    def from_pretrained(cls, path: str | Path, settings: BaseSettings | None = None, **options: Any) -> Self:
        """Load a base in diffusers' format.

        Args:
            path: Folder or hub id.
            settings: The base's geometry; by default what stands in its folder, else its family's.
            **options: As for every diffusers pipeline, such as `torch_dtype`.

        Raises:
            UserError: The weights cannot be had.
        """
        settings = settings or BaseSettings.of(str(path))
        settings = replace(settings, path=str(path))
        settings.check_weights()
        if settings.transformer_file is not None:
            dtype = options.get("dtype", options.get("torch_dtype")) or torch.float32
            options |= transformer_of(settings, dtype)
        pipeline = super().from_pretrained(str(path), **options)
        pipeline.configure(settings)
        return pipeline

    @classmethod
    def over(cls, base: Driver, method: Method) -> Self:
        """A pipeline over a base that is loaded already, adapters included."""
        components = {name: base.pipeline.components[name] for name in base.parts}
        pipeline = cls(**components, is_distilled=base.settings.distilled)
        pipeline.base, pipeline.method = base, method
        pipeline._adopt_adapters()
        return pipeline

    def configure(self, settings: BaseSettings, backend: str = "auto") -> None:
        """Set the base's geometry and the attention backend; a LoRA goes on acting where it acts."""
        before = self.base
        self.base = load_family(settings).from_components(self.components, settings, backend)
        if before is not None:
            self.base.guidance_adapters, self.base.image_adapters = before.guidance_adapters, before.image_adapters

    @property
    def settings(self) -> BaseSettings:
        """The base's geometry."""
        return self.base.settings
