"""Training of the embedded base's autoencoder."""

from __future__ import annotations

import math
from pathlib import Path

import lightning
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from scale_dit.embedded.build import build_vae
from scale_dit.optimisers import warmup_cosine


def spectrum_loss(reconstruction: Tensor, picture: Tensor, patch: int = 16) -> Tensor:
    """L1 between the log amplitude spectra of disjoint patches.

    A squared error alone fades out fine texture that cannot be predicted exactly; its power can be kept.

    Args:
        reconstruction, picture: `[B, 3, H, W]` in [-1, 1], sides multiples of `patch`.

    Returns:
        A scalar.
    """

    def log_amplitude(images: Tensor) -> Tensor:
        patches = images.float().unfold(2, patch, patch).unfold(3, patch, patch)
        return torch.log(torch.fft.rfft2(patches, norm="ortho").abs() + 1e-2)

    return F.l1_loss(log_amplitude(reconstruction), log_amplitude(picture))


def peak_signal_to_noise(reconstruction: Tensor, picture: Tensor) -> Tensor:
    """PSNR in dB of each picture, `[B]`, for pictures `[B, 3, H, W]` in [-1, 1]."""
    error = (reconstruction.float().clamp(-1, 1) - picture.float()).square().mean(dim=(1, 2, 3)) / 4
    return -10 * torch.log10(error)


class TinyVAEModule(lightning.LightningModule):
    """Trains an AutoencoderKL on pictures `[B, 3, H, W]` in [0, 1] (batch key `image`).

    Loss: L1 + `spectrum_weight` * spectrum loss + `kl_weight` * KL(posterior, N(0, 1)), the KL averaged over elements.

    Args:
        learning_rate: Peak of a warm-up and cosine schedule over the trainer's steps.
        kl_weight: Keeps the latents near a unit Gaussian; small, the diffusion model normalises them anyway.
        spectrum_weight: Weight of `spectrum_loss`.
        initial: Folder whose `vae/` is trained on; by default training starts afresh.
        export: Folder that gets `vae/` when training ends, with the measured `scaling_factor` and `shift_factor`.
    """

    def __init__(
        self,
        learning_rate: float = 1e-3,
        kl_weight: float = 1e-4,
        spectrum_weight: float = 0.02,
        initial: str | None = None,
        export: str | None = None,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.vae = build_vae()
        if initial:
            self.vae.load_state_dict(AutoencoderKL.from_pretrained(initial, subfolder="vae").state_dict())
        self.latent_moments: list[Tensor] = []

    def on_fit_start(self) -> None:
        """Convolutions of a GPU are faster in channels-last order; compiling would cost minutes for little."""
        if self.device.type == "cuda":
            self.vae.to(memory_format=torch.channels_last)

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        """One step on `batch["image"]`."""
        picture = batch["image"] * 2 - 1
        posterior = self.vae.encode(picture).latent_dist
        reconstruction = self.vae.decode(posterior.sample()).sample
        reconstruction_loss = F.l1_loss(reconstruction.float(), picture)
        spectrum = spectrum_loss(reconstruction, picture)
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).float().mean()
        loss = reconstruction_loss + self.hparams.spectrum_weight * spectrum + self.hparams.kl_weight * kl
        self.log_dict({"train/loss": loss, "train/l1": reconstruction_loss, "train/spectrum": spectrum, "train/kl": kl})
        return loss

    def on_validation_epoch_start(self) -> None:
        """Start the latent statistics anew."""
        self.latent_moments = []

    def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
        """PSNR of the posterior mean's reconstruction, and the latents' first two moments."""
        picture = batch["image"] * 2 - 1
        latents = self.vae.encode(picture).latent_dist.mean
        psnr = peak_signal_to_noise(self.vae.decode(latents).sample, picture)
        moments = latents.float()
        self.latent_moments.append(torch.stack([moments.mean(), moments.square().mean()]))
        self.log("val/psnr_db", psnr.mean(), batch_size=len(picture), prog_bar=True, sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        """Write the normalisation that the diffusion model applies into the autoencoder's config."""
        mean, square = torch.stack(self.latent_moments).mean(dim=0).tolist()
        scale = 1 / math.sqrt(max(square - mean * mean, 1e-12))
        self.vae.register_to_config(shift_factor=mean, scaling_factor=scale)

    def on_fit_end(self) -> None:
        """Export the autoencoder."""
        if self.hparams.export and self.trainer.is_global_zero:
            export_vae(self.vae, self.hparams.export)

    def configure_optimizers(self) -> dict[str, object]:
        """AdamW with warm-up and cosine decay."""
        optimiser = torch.optim.AdamW(self.vae.parameters(), lr=self.hparams.learning_rate, betas=(0.9, 0.99))
        return warmup_cosine(optimiser, self.trainer, warmup=50)


def export_vae(vae: AutoencoderKL, folder: str | Path) -> None:
    """Write `folder/vae` in bfloat16, in contiguous memory format."""
    plain = build_vae()
    plain.load_state_dict(vae.state_dict())
    plain.register_to_config(shift_factor=vae.config.shift_factor, scaling_factor=vae.config.scaling_factor)
    plain.to(torch.bfloat16).save_pretrained(Path(folder) / "vae")
