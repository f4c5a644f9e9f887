"""How good is the embedded base? PSNR of its autoencoder, and what the parser finds in its pictures at 256 px.

python experiments/tiny_base/run.py            about 9 minutes on two cores, seconds on a GPU
python experiments/tiny_base/run.py --dry      print, record nothing
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch

from scale_dit.data.scene_batches import held_out_scenes
from scale_dit.data.scenes import render
from scale_dit.embedded.vae import peak_signal_to_noise
from scale_dit.evaluation.figures import record_figure
from scale_dit.evaluation.intervals import wilson
from scale_dit.evaluation.studies import score_drafts
from scale_dit.models.settings import BaseSettings
from scale_dit.pipeline import ScaleDiTPipeline


def reconstruction_psnr(pipeline: ScaleDiTPipeline, count: int, device: str) -> float:
    """Mean PSNR in dB of the posterior mean's reconstruction of held-out whole scenes at 256 px."""
    values = []
    for scene in held_out_scenes(count):
        picture = render([scene], 256, 256, device)
        with torch.no_grad():
            again = pipeline.base.decode_latents(pipeline.base.encode_images(picture))
        values.append(peak_signal_to_noise(again * 2 - 1, picture * 2 - 1))
    return float(torch.cat(values).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="assets/tiny-flux")
    parser.add_argument("--n", type=int, default=200, help="held-out captions")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--shift", type=float, help="of the noise levels, instead of the base's own; records nothing")
    parser.add_argument("--dry", action="store_true", help="print, record nothing")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = BaseSettings.of(options.base)
    if options.shift is not None:
        settings = replace(settings, shift=options.shift)
    pipeline = ScaleDiTPipeline.from_pretrained(options.base, settings).to(device)
    psnr = reconstruction_psnr(pipeline, options.n, device)
    print(f"autoencoder: {psnr:.2f} dB on {options.n} scenes")
    summary = score_drafts(pipeline, held_out_scenes(options.n), options.batch, scale=4.0)[1]
    print("  ".join(f"{name} {value:.3f}" for name, value in summary.items()))
    if options.dry or options.shift is not None:
        return
    record_figure("tiny_vae_psnr_db", psnr, "dB", n=options.n)
    for name in ("count", "colour"):
        share = summary[f"{name}_accuracy"]
        low, high = wilson(round(share * options.n), options.n)
        record_figure(f"tiny_{name}_accuracy_256", share, "share", low, high, options.n)
    for name in ("shape", "place"):  # means over pictures, not shares of them
        record_figure(f"tiny_{name}_accuracy_256", summary[f"{name}_accuracy"], "share", n=options.n)


if __name__ == "__main__":
    main()
