"""At which noise levels does a LoRA use the draft? Loss by level on held-out scenes, at the base's native size.

python experiments/noise_levels/run.py LORA_FOLDER ...      about a minute a LoRA on two cores
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from scale_dit.data.captions import caption
from scale_dit.data.encoding import encode_batch
from scale_dit.data.scene_batches import held_out_scenes
from scale_dit.data.scenes import render
from scale_dit.evaluation.studies import add_rows
from scale_dit.method import Method, Plan
from scale_dit.models.text import Text
from scale_dit.pipeline import ScaleDiTPipeline
from scale_dit.sampling import add_noise

LEVELS = (1.0, 0.98, 0.95, 0.9, 0.8, 0.5, 0.2)


@torch.no_grad()
def losses(pipeline: ScaleDiTPipeline, plan: Plan, pair: dict, device: str) -> list[float]:
    """Mean squared error of the velocity at each of `LEVELS`, on the same noise for every plan."""
    base = pipeline.base
    latents = pair["latents"].float()
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)).to(device)
    clean, noise = (base.pack(each, plan.layout.image_order) for each in (latents, noise))
    text = Text(**pair["text"])
    guidance = None
    if plan.layout.guidance is not None:
        draft = base.pack(pair["guidance_latents"].float(), plan.layout.guidance_order)
        guidance = base.guidance_pass(draft, text.pooled, plan, 1.0)
    found = []
    for level in LEVELS:
        time = torch.full((len(clean),), level, device=device)
        velocity = base.image_pass(add_noise(clean, noise, level), text, time, plan, guidance, 1.0)
        found.append(torch.nn.functional.mse_loss(velocity.float(), noise - clean).item())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loras", nargs="*", help="folders of LoRAs of the embedded base")
    parser.add_argument("--base", default="assets/tiny-flux")
    parser.add_argument("--n", type=int, default=48, help="held-out scenes")
    parser.add_argument("--to", type=Path, default=Path(__file__).with_name("results.csv"))
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = ScaleDiTPipeline.from_pretrained(options.base).to(device)
    side, scenes = pipeline.settings.native, held_out_scenes(options.n)
    pair = encode_batch(
        render(scenes, side, side, device), [caption(scene, scene.seed) for scene in scenes],
        pipeline.base.encode_images, pipeline.base.encode_prompts, Method().scale, pipeline.settings.token_size, None,
    )  # fmt: skip
    plans = {
        "dense, no draft": Method(guidance=False, windowed=False),
        "windows, no draft": Method(guidance=False),
        "windows and draft, no LoRA": Method(),
    }
    table = {
        name: losses(pipeline, method.plan(pipeline.settings, side, side), pair, device)
        for name, method in plans.items()
    }
    for folder in options.loras:
        pipeline.load_lora_weights(folder)
        plan = Method().plan(pipeline.settings, side, side)
        table[f"windows and draft, LoRA {Path(folder).name}"] = losses(pipeline, plan, pair, device)
    rows = [
        {"what": name, **{f"loss_at_{level}": f"{loss:.4f}" for level, loss in zip(LEVELS, row, strict=True)}}
        for name, row in table.items()
    ]
    add_rows(options.to, [row | {"n": options.n} for row in rows], keys=("what",))
    for name, row in table.items():
        print(f"{name:45}", *(f"{value:.4f}" for value in row))


if __name__ == "__main__":
    main()
