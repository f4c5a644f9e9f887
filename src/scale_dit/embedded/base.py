"""Training of the embedded base: transformer and both text encoders together, on the autoencoder's latents."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTokenizer, T5TokenizerFast

from scale_dit.attention import avoid_failing_kernels
from scale_dit.callbacks.ema import averaged_weights
from scale_dit.embedded.build import build_text, build_transformer, initialise_transformer, save_pipeline
from scale_dit.errors import UserError
from scale_dit.models.settings import BaseSettings
from scale_dit.optimisers import warmup_cosine
from scale_dit.sampling import training_levels


@dataclass(frozen=True)
class Tokenizers:
    """Captions to token ids as FluxPipeline makes them: CLIP `[B, 77]` and T5 `[B, 64]`, padded, without a mask."""

    clip: CLIPTokenizer
    t5: T5TokenizerFast

    def __call__(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Both tokenizers' ids."""
        clip = self.clip(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        t5 = self.t5(captions, padding="max_length", truncation=True, return_tensors="pt")
        return clip.input_ids, t5.input_ids


class TinyBaseModule(lightning.LightningModule):
    """Flow matching (Esser et al. 2024) of a small FLUX: x_t = (1-t) x_0 + t eps, target eps - x_0.

    Noise levels are logit-normal, shifted as in sampling: t = s u / (1 + (s - 1) u), u = sigmoid(spread * normal), with
    the base's `training_shift` s and `training_spread`. Objects are decided above t = 0.9, their places above 0.95.
    Neither shifted nor spread, 1.4 % of the levels exceed 0.9, and the base learnt colours and textures from them; with
    shift 3, 14 % exceed 0.9 and 3 % exceed 0.95, and it learnt shapes and numbers.

    Batch: `latents` `[B, 16, h, w]` normalised, `clip_ids` `[B, 77]`, `t5_ids` `[B, 64]`.

    Args:
        vae: Folder that holds `vae/` of a trained autoencoder (`experiment=tiny_vae` writes it).
        settings: Geometry and noise levels, written beside the weights, so that these can be loaded by path alone.
        captions: Texts from which the tokenizers are learnt.
        learning_rate: Peak of a warm-up and cosine schedule.
        caption_dropout: Share of captions replaced by the empty text, for classifier-free guidance.
        largest_offset: Some batches shift all positions by up to this many tokens a side, so that positions beyond
            the native grid are not foreign to the rotary embedding. They are shifted by a whole grid at least, so that
            positions near the origin tell where in the picture a token is, hence what "top left" means.
        offset_share: Share of those batches.
        initial: Folder of a base to train further; by default training starts afresh.
        compile: Compile the transformer's blocks on a GPU.
        export_every: Steps between exports, so that a run that is cut off leaves a base.
        export: Folder that gets the whole pipeline, then and when training ends.
    """

    def __init__(
        self,
        vae: str,
        settings: BaseSettings,
        captions: list[str] | None = None,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        caption_dropout: float = 0.1,
        largest_offset: int = 64,
        offset_share: float = 0.2,
        initial: str | None = None,
        compile: bool = True,
        export_every: int = 1000,
        export: str | None = None,
    ):
        super().__init__()
        if initial and export and Path(initial).resolve() == Path(export).resolve():
            raise UserError(
                f"the base in {initial} would be overwritten while it is trained further: give the result another "
                f"folder, paths.tiny_base=<folder> with the autoencoder's vae/ in it"
            )
        least = 2 * settings.native // settings.token_size
        if offset_share and largest_offset < least:
            raise UserError(
                f"largest_offset is {largest_offset}, but it must be at least {least}, twice the native grid, because "
                f"positions are shifted by a whole grid at least: set model.largest_offset=64, or model.offset_share=0"
            )
        self.save_hyperparameters(ignore=["captions", "settings"])
        self.settings = settings
        if not (Path(vae) / "vae").is_dir():
            raise UserError(f"no autoencoder in {vae}/vae; train it first: python src/train.py experiment=tiny_vae")
        self.vae = AutoencoderKL.from_pretrained(vae, subfolder="vae").requires_grad_(False).eval()
        parts = _initial_parts(initial) if initial else _fresh_parts(captions or sample_captions())
        self.tokenizer, self.tokenizer_2 = parts["tokenizer"], parts["tokenizer_2"]
        self.tokenize = Tokenizers(self.tokenizer, self.tokenizer_2)
        self.text_encoder: nn.Module = parts["text_encoder"]
        self.text_encoder_2: nn.Module = parts["text_encoder_2"]
        self.transformer: FluxTransformer2DModel = parts["transformer"]
        self.empty = self.tokenize([""])
        self.exported_step = 0

    def on_fit_start(self) -> None:
        """Prepare a GPU."""
        avoid_failing_kernels(self.transformer.config.attention_head_dim)
        if self.device.type == "cuda" and self.hparams.compile:
            # Blocks are compiled one by one, so gradients overlap with their reduction without splitting graphs.
            torch._dynamo.config.optimize_ddp = False
            self.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        """One flow-matching step."""
        latents = batch["latents"].float()
        count, _, height, width = latents.shape
        clip_ids, t5_ids = self._drop_captions(batch["clip_ids"], batch["t5_ids"])
        noise = torch.randn_like(latents)
        t = training_levels(count, self.settings.training_shift, latents.device, spread=self.settings.training_spread)
        noisy = torch.lerp(latents, noise, t.view(-1, 1, 1, 1))
        text = self.text_encoder_2(t5_ids)[0]
        velocity = self.transformer(
            hidden_states=pack(noisy),
            encoder_hidden_states=text,
            pooled_projections=self.text_encoder(clip_ids).pooler_output,
            timestep=t,
            img_ids=self._positions(height // 2, width // 2),
            txt_ids=torch.zeros(text.shape[1], 3, device=latents.device),
            return_dict=False,
        )[0]
        loss = nn.functional.mse_loss(velocity.float(), pack(noise - latents))
        self.log("train/loss", loss)
        return loss

    def _drop_captions(self, clip_ids: Tensor, t5_ids: Tensor) -> tuple[Tensor, Tensor]:
        drop = torch.rand(len(clip_ids), 1, device=clip_ids.device) < self.hparams.caption_dropout
        empty_clip, empty_t5 = (ids.to(clip_ids.device, non_blocking=True) for ids in self.empty)
        return torch.where(drop, empty_clip, clip_ids.long()), torch.where(drop, empty_t5, t5_ids.long())

    def _positions(self, height: int, width: int) -> Tensor:
        top, left = 0, 0
        if torch.rand(()) < self.hparams.offset_share:
            top, left = torch.randint(max(height, width), self.hparams.largest_offset + 1, (2,)).tolist()
        # Made on the device: to copy them there would wait for it, and let it run idle.
        rows, columns = torch.meshgrid(
            torch.arange(top, top + height, device=self.device),
            torch.arange(left, left + width, device=self.device),
            indexing="ij",
        )
        return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()

    def _components(self) -> dict[str, object]:
        names = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer")
        return {name: getattr(self, name) for name in names}

    def on_train_batch_end(self, *_: Any) -> None:
        """Export now and then, once a step."""
        if self.global_step > self.exported_step and self.global_step % self.hparams.export_every == 0:
            self.exported_step = self.global_step
            with averaged_weights(self.trainer):
                self.export()

    def on_fit_end(self) -> None:
        """Export the average."""
        self.export()

    def export(self) -> None:
        """Write the pipeline, and the settings beside it, from rank 0."""
        if not self.hparams.export or not self.trainer.is_global_zero:
            return
        # Copies, because saving casts to bfloat16 and the originals are being trained.
        components = {
            name: copy.deepcopy(part) if name.startswith("text_encoder") else part
            for name, part in self._components().items()
        }
        fresh = build_transformer()
        fresh.load_state_dict(self.transformer.state_dict())
        components |= {"transformer": fresh, "vae": AutoencoderKL.from_pretrained(self.hparams.vae, subfolder="vae")}
        save_pipeline(components, self.hparams.export, shift=self.settings.shift)
        self.settings.save(self.hparams.export)

    def configure_optimizers(self) -> dict[str, object]:
        """AdamW over everything but the frozen autoencoder."""
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimiser = torch.optim.AdamW(
            parameters,
            lr=self.hparams.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=self.hparams.weight_decay,
        )
        return warmup_cosine(optimiser, self.trainer, warmup=200)


def _fresh_parts(captions: list[str]) -> dict[str, Any]:
    transformer = build_transformer()
    initialise_transformer(transformer)
    return build_text(captions) | {"transformer": transformer}


def _initial_parts(folder: str) -> dict[str, Any]:
    if not (Path(folder) / "transformer").is_dir():
        raise UserError(f"no base in {folder} to train further; leave model.initial=null to start afresh")
    return {
        name: part.requires_grad_(True) if isinstance(part, nn.Module) else part
        for name, part in FluxPipeline.from_pretrained(folder, vae=None).components.items()
    }


def pack(latents: Tensor) -> Tensor:
    """FLUX's 2x2 packing: `[B, C, 2h, 2w]` -> `[B, h*w, 4C]`."""
    return FluxPipeline._pack_latents(latents, *latents.shape)


def sample_captions(count: int = 20_000) -> list[str]:
    """Captions of training scenes, for learning the tokenizers."""
    from scale_dit.data.captions import caption
    from scale_dit.data.scenes import sample_scene

    scenes = (sample_scene(1_000_000_000 + index) for index in range(count))
    return [caption(scene, scene.seed) for scene in scenes]
