"""Training of the LoRA: wiring of the base, the method, the loss and the optimiser."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor

from scale_dit.attention import check_backend
from scale_dit.errors import UserError
from scale_dit.flow_matching import flow_matching_loss
from scale_dit.lora import (
    ADAPTER,
    LoraSettings,
    add_lora,
    check_record,
    load_lora_state,
    lora_state,
    read_lora,
    save_lora,
)
from scale_dit.lora_fit import check_own_fit
from scale_dit.method import Method, Plan
from scale_dit.models import load_family
from scale_dit.models.settings import BaseSettings
from scale_dit.models.text import Text
from scale_dit.optimisers import build_optimiser, check_optimiser, warmup_cosine
from scale_dit.planning.components import transformer_on_meta
from scale_dit.sampling import training_levels

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class ScaleDiTModule(lightning.LightningModule):
    """Flow matching of image tokens that read a clean draft: both passes run, gradients reach the LoRA alone.

    A batch holds `latents` `[B, C, h, w]`, `guidance_latents` `[B, C, h/s, w/s]` and `text` (`tokens`, `pooled`), as
    `scale_dit.data.encoding.encode_batch` makes them. Noise, noise levels and caption dropout of a step depend on
    the seed, the epoch, the batch's index in it and the rank only, so a resumed run repeats an uninterrupted one.

    Args:
        base: The base's geometry and where its weights are.
        method: Window, order, anchors, scale.
        lora: Rank, alpha and scope.
        backend: Attention backend.
        optimiser: `adamw` or `prodigy`.
        learning_rate: Peak; a multiplier, usually 1, for prodigy.
        warmup: Steps of linear warm-up.
        caption_dropout: Share of captions that the image pass does not see.
        training_guidance_scale: Embedded guidance scale of distilled bases; anything but 1 ruins them.
        dtype: Of the frozen base: `float32` or `bfloat16`. The LoRA is float32.
        gradient_checkpointing: Recompute blocks in the backward pass.
        initial_lora: LoRA file to start from instead of a fresh one.
        export: Folder that gets the LoRA when training ends.
        seed: Seed of noise, noise levels and caption dropout.
        before_loading: Called with the module when its settings are known to be possible, before weights are loaded.
    """

    strict_loading = False

    def __init__(
        self,
        base: BaseSettings,
        method: Method,
        lora: LoraSettings,
        backend: str = "auto",
        optimiser: str = "adamw",
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        warmup: int = 50,
        caption_dropout: float = 0.1,
        training_guidance_scale: float = 1.0,
        dtype: str = "float32",
        gradient_checkpointing: bool = False,
        initial_lora: str | None = None,
        export: str | None = None,
        seed: int = 0,
        before_loading: Callable[[ScaleDiTModule], None] | None = None,
    ):
        super().__init__()
        if dtype not in DTYPES:
            raise UserError(f"unknown dtype {dtype!r}: use one of {', '.join(DTYPES)} (model.dtype=...)")
        if not 0 <= caption_dropout <= 1:
            raise UserError(f"caption_dropout is {caption_dropout}, but it is a share: use 0 to 1, usually 0.1")
        check_backend(backend)
        check_optimiser(optimiser)
        if lora.scope == "guidance" and not method.guidance:
            raise UserError(
                "the LoRA acts on the guidance tokens, but the method has none, so there is nothing to train: set "
                "method.guidance=true, or lora=all_tokens"
            )
        # Only plain values: a config object in a checkpoint cannot be loaded with weights_only.
        self.save_hyperparameters(ignore=["base", "method", "lora", "before_loading"])
        self.base_settings, self.method, self.lora_settings = base, method, lora
        self.plan_for(base.native, base.native)  # says what cannot be before weights are loaded
        initial = self._read_initial(initial_lora) if initial_lora else None
        family = load_family(base)
        if before_loading is not None:
            before_loading(self)
        self.base = family.load(
            base, dtype=DTYPES[dtype], backend=backend, gradient_checkpointing=gradient_checkpointing
        )
        self.base.freeze()
        add_lora(self.base.transformer, lora)
        if initial is not None:
            load_lora_state(self.base.transformer, initial, f"LoRA file {initial_lora}")
        self.base.guidance_adapters = (ADAPTER,)
        self.base.image_adapters = (ADAPTER,) if lora.scope == "all" else ()
        self._put_aside: dict[str, torch.nn.Module] = {}
        self.transformer = self.base.transformer  # a submodule, so that Lightning moves and trains it

    def _read_initial(self, path: str) -> dict[str, Tensor]:
        tensors, record = read_lora(path)
        check_record(record, self.base_settings.name, {})
        if record["rank"] != self.lora_settings.rank:
            raise UserError(
                f"LoRA file {path} has rank {record['rank']}, but the LoRA to train has rank "
                f"{self.lora_settings.rank}: set lora.rank={record['rank']}, or start without it"
            )
        check_own_fit(transformer_on_meta(self.base_settings), tensors, record["rank"], f"LoRA file {path}")
        return tensors

    def plan_for(self, height: int, width: int) -> Plan:
        """The plan for pictures of this size in px, made once."""
        return _plan(self.method, self.base_settings, height, width)

    def setup(self, stage: str) -> None:
        """Encode the empty caption and the prompts that callbacks draw, and put the text encoders aside.

        Batches bring their texts' embeddings: the data module, which may have needed the encoders, was set up before.
        The transformer comes to the device after, so that both need not fit. When training ends, they are back.
        """
        drawn = {prompt for callback in self.trainer.callbacks for prompt in getattr(callback, "prompts", ())}
        device = self.trainer.strategy.root_device
        self.base.encoders_to(device)
        self.base.remember_prompts([(prompt,) for prompt in sorted({"", *drawn})], device)
        self._put_aside |= {name: encoder.cpu() for name, encoder in self.base.drop_text_encoders().items()}

    def on_fit_start(self) -> None:
        """Move what is no submodule."""
        self.base.to(self.device)
        self.empty_text = self.base.encode_prompts([""])

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        """One flow-matching step."""
        generator = torch.Generator(self.device).manual_seed(self._step_seed(batch_index))
        loss = self.loss(batch, generator)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["latents"]))
        return loss

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        """Flow matching (`flow_matching_loss`) at logit-normal noise levels."""
        latents, base = batch["latents"].float(), self.base
        plan = self.plan_for(latents.shape[2] * self._latent_px, latents.shape[3] * self._latent_px)
        clean = base.pack(latents, plan.layout.image_order)
        noise = torch.randn(clean.shape, generator=generator, device=self.device)
        levels = self.base_settings
        time = training_levels(len(clean), levels.training_shift, self.device, generator, levels.training_spread)
        text = Text(**batch["text"])
        draft = None
        if plan.layout.guidance is not None:
            draft = base.pack(batch["guidance_latents"].float(), plan.layout.guidance_order)
        seen_text = self._drop_captions(text, generator)
        scale = self.hparams.training_guidance_scale
        return flow_matching_loss(base, plan, clean, draft, text, seen_text, noise, time, scale)

    @property
    def base_dtype(self) -> torch.dtype:
        """Of the frozen base."""
        return DTYPES[self.hparams.dtype]

    @property
    def _latent_px(self) -> int:
        return self.base_settings.token_size // 2

    def _step_seed(self, batch_index: int) -> int:
        # Not the optimiser step, which the batches of an accumulated step share.
        place = self.current_epoch * 1_000_003 + batch_index
        return (self.hparams.seed * 1_000_000_007 + place) * 4096 + self.global_rank & 2**63 - 1

    def _drop_captions(self, text: Text, generator: torch.Generator) -> Text:
        drop = torch.rand(len(text.pooled), 1, generator=generator, device=self.device) < self.hparams.caption_dropout
        return Text(
            torch.where(drop[:, :, None], self.empty_text.tokens, text.tokens),
            torch.where(drop, self.empty_text.pooled, text.pooled),
        )

    def configure_optimizers(self) -> dict[str, Any]:
        """The chosen optimiser over the LoRA, with warm-up and cosine decay."""
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimiser = build_optimiser(
            self.hparams.optimiser, parameters, self.hparams.learning_rate, self.hparams.weight_decay
        )
        return warmup_cosine(optimiser, self.trainer, self.hparams.warmup)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The LoRA alone: the frozen base is never written into a checkpoint."""
        return lora_state(self.transformer)

    def load_state_dict(self, state_dict: dict[str, Tensor], strict: bool = True, assign: bool = False) -> None:
        """Load the LoRA of a checkpoint."""
        load_lora_state(self.transformer, state_dict, "the checkpoint's LoRA")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record what the LoRA belongs to."""
        checkpoint["scale_dit"] = self.record

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another base or rank before anything is loaded."""
        record = checkpoint.get("scale_dit", {})
        for key, remedy in (("base", "base="), ("rank", "lora.rank=")):
            if record.get(key) != self.record[key]:
                raise UserError(
                    f"the checkpoint was trained with {key} {record.get(key)!r}, but now {key} is "
                    f"{self.record[key]!r}: set {remedy}{record.get(key)}, or start a new run"
                )

    @property
    def record(self) -> dict[str, Any]:
        """What a LoRA of this run was trained for, as plain values."""
        own = {"base": self.base_settings.name, "rank": self.lora_settings.rank}
        return own | self.method.summary

    def save_lora(self, folder: str | Path) -> Path:
        """Write the LoRA in diffusers' format."""
        return save_lora(self.transformer, folder, self.lora_settings, self.record)

    def on_fit_end(self) -> None:
        """Export the LoRA; text encoders are where the rest of the base comes to be, in the host's memory."""
        self.base.pipeline.register_modules(**self._put_aside)
        if self.hparams.export and self.trainer.is_global_zero:
            self.save_lora(self.hparams.export)


@lru_cache(maxsize=64)
def _plan(method: Method, base: BaseSettings, height: int, width: int) -> Plan:
    return method.plan(base, height, width)
