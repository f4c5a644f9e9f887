"""What a pipeline is made of: loading a base in diffusers' format, its geometry, and the LoRA."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import DiffusionPipeline

from scale_dit.autoencoder import Decoding
from scale_dit.lora import ADAPTER, LoraSettings, check_record, load_lora, read_lora, remove_lora
from scale_dit.method import Method
from scale_dit.models import load_family
from scale_dit.models.driver import Driver
from scale_dit.models.settings import BaseSettings
from scale_dit.models.single_file import transformer_of

log = logging.getLogger(__name__)


class LoadedPipeline(DiffusionPipeline):
    """The components of the base's stock pipeline, unmodified, with the driver over them and, at times, a LoRA."""

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
        self.lora_settings: LoraSettings | None = None
        self.lora_record: dict[str, Any] = {}
        self.lora_path: str | None = None
        self.base: Driver = None  # type: ignore[assignment]
        kind = type(transformer).__name__
        self.configure(BaseSettings.of_kind(kind, kind, is_distilled))

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

    def load_lora_weights(self, path: str | Path) -> None:
        """Load a Scale-DiT LoRA; it acts where its own scope says.

        Raises:
            UserError: It is missing, broken, foreign, or of another base.
        """
        _, record = read_lora(path)
        method = {key: value for key, value in self.method.summary.items() if key != "scale"}  # a call has its own
        for difference in check_record(record, self.settings.name, method):
            log.warning("%s", difference)
        self.unload_lora_weights()
        self.lora_settings, self.lora_record = load_lora(self.transformer, path)
        self.lora_path = str(path)
        self.base.guidance_adapters = (ADAPTER,)
        self.base.image_adapters = (ADAPTER,) if self.lora_settings.scope == "all" else ()

    def unload_lora_weights(self) -> None:
        """Remove the LoRA, also one that the base came with."""
        if ADAPTER in getattr(self.transformer, "peft_config", {}):
            remove_lora(self.transformer)
            self.base.guidance_adapters, self.base.image_adapters = (), ()
            self.lora_settings, self.lora_record, self.lora_path = None, {}, None
