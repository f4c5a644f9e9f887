"""Ways to decode a picture: how far from the untiled decoder, how long, how much memory.

python experiments/decode/measure.py --base tiny --px 512 1024             errors, on scenes that it encoded
python experiments/decode/measure.py --base flux1 --px 2048 4096 8192      seconds and memory, on a GPU

`flux1` is the shape of FLUX.1's autoencoder with random weights: what it costs does not depend on them. Rows go to
results.csv in this folder, or in the one that --to names.
"""

from __future__ import annotations

import argparse
import copy
import gc
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from scale_dit.autoencoder import Decoding, decode, encode
from scale_dit.autoencoder.memory import decode_bytes
from scale_dit.autoencoder.tiles import seam_score
from scale_dit.benchmark.timing import peak_and_seconds
from scale_dit.data.render import render
from scale_dit.data.scene_sampling import sample_scene
from scale_dit.device import pin_with_threads
from scale_dit.evaluation.studies import add_rows
from scale_dit.provenance import project_root

HERE = Path(__file__).parent
FLUX1 = {
    "latent_channels": 16, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip
TILES = {"tiny": (384, 144), "flux1": (1024, 256)}
"""Side and overlap of tiles in px; overlaps are at least twice what convolutions reach."""
REFERENCE = {"tiny": Decoding("whole"), "flux1": Decoding("streamed")}
"""How the picture that others are held against is decoded, in float32: untiled, or where that does not fit as exact."""
REFERENCE_LIMIT = {"tiny": 2048, "flux1": 4096}
"""Largest side in px that is decoded so, or `whole`."""
STOCK_TILES = "diffusers' tiles"
MODES = ("whole", "streamed", "host", "tiled", STOCK_TILES)


def autoencoder(base: str, device: torch.device) -> Any:
    """The embedded base's, in float32, or FLUX.1's shape, in bfloat16 with random weights."""
    if base == "tiny":
        vae = AutoencoderKL.from_pretrained(project_root() / "assets" / "tiny-flux" / "vae", torch_dtype=torch.float32)
    else:
        torch.manual_seed(0)
        vae = AutoencoderKL(**FLUX1).to(torch.bfloat16)
    return vae.to(device).eval().requires_grad_(False)


def latents_of(base: str, vae: Any, px: int, device: torch.device) -> Tensor:
    """Latents of a scene of `px` x `px`; random ones for random weights."""
    if base != "tiny":
        return torch.randn(1, 16, px // 8, px // 8, generator=torch.Generator(device).manual_seed(1), device=device)
    return encode(vae, render([sample_scene(seed=7, split="test", zoom=1.0)], px, px))


@torch.no_grad()
def measure(base: str, sizes: Sequence[int], modes: Sequence[str], to: Path) -> None:
    """Add a row for every size and mode."""
    device = torch.device("cuda" if base != "tiny" else "cpu")
    pin_with_threads()
    torch.backends.cudnn.allow_tf32 = False  # which rounds the reference; bfloat16 is not touched
    vae = autoencoder(base, device)
    for px in sizes:
        latents, right = latents_of(base, vae, px, device), None
        if px <= REFERENCE_LIMIT[base]:
            right = decode(
                copy.deepcopy(vae).float(), latents, Decoding("streamed" if base != "tiny" else "whole")
            ).cpu()
        for mode in modes:
            if mode == "whole" and px > REFERENCE_LIMIT[base]:
                continue
            tile, overlap = TILES[base]
            how = None if mode == STOCK_TILES else Decoding(mode, tile=tile, overlap=overlap)
            picture, seconds, peak = _timed(vae, latents, how, tile, device)
            row = {"base": base, "px": px, "mode": mode, "seconds": f"{seconds:.3f}", "peak_gb": peak}
            planned = "" if how is None else f"{decode_bytes(vae, px, px, mode, tile) / 1e9:.3f}"
            row |= {"planned_gb": planned, **_errors(picture, right, px, tile, overlap)}
            print(*row.values(), flush=True)
            add_rows(to / "results.csv", [row], ("base", "px", "mode"))
            del picture
        del right
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def stock_tiles(vae: Any, latents: Tensor, tile: int) -> Tensor:
    """What diffusers' own tiling makes of latents, in [0, 1]: tiles with statistics and attention of their own."""
    vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size = tile, tile // 8
    picture = vae.decode(latents.to(vae.dtype)).sample
    vae.disable_tiling()
    return (picture.float() / 2 + 0.5).clamp(0, 1)


def _timed(
    vae: Any, latents: Tensor, how: Decoding | None, tile: int, device: torch.device
) -> tuple[Tensor, float, str]:
    """The picture on the CPU, seconds, and GB at most beside what was there before; nobody counts those of a CPU."""
    made: list[Tensor] = []

    def run() -> None:
        made[:] = [(stock_tiles(vae, latents, tile) if how is None else decode(vae, latents, how)).cpu()]

    if device.type == "cpu":
        began = time.perf_counter()
        run()
        return made[0], time.perf_counter() - began, ""
    held = torch.cuda.memory_allocated() / 1e9
    torch.cuda.empty_cache()
    peak, seconds = peak_and_seconds(run)
    return made[0], seconds, f"{peak - held:.3f}"


def _errors(picture: Tensor, right: Tensor | None, px: int, tile: int, overlap: int) -> dict[str, str]:
    """Against the untiled picture in float32, in levels of 255, and the seam score at the borders of our tiles."""
    borders = list(range(tile - overlap // 2, px - overlap // 2, tile - overlap))
    seams = f"{seam_score(picture, borders):.3f}" if borders else ""
    if right is None:
        return {"max_error": "", "rms_error": "", "seams": seams}
    difference = (picture - right).abs() * 255
    return {
        "max_error": f"{difference.max():.2e}", "rms_error": f"{difference.square().mean().sqrt():.2e}", "seams": seams,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", choices=list(TILES), required=True)
    parser.add_argument("--px", type=int, nargs="+", required=True, help="sides of the pictures")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--to", type=Path, default=HERE, help="folder of the table")
    options = parser.parse_args()
    measure(options.base, options.px, options.modes, options.to)


if __name__ == "__main__":
    main()
