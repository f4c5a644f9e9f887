"""Which guidance scale suits the embedded base's drafts, and which scale and start the refinement that reads them?

python experiments/guidance_and_start/run.py                              drafts; minutes on a GPU
python experiments/guidance_and_start/run.py --lora LORA --scales 1 2     pictures at several guidance scales
python experiments/guidance_and_start/run.py --lora none --starts 0.9     pictures without a LoRA

All on the validation split, which no reported accuracy is measured on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from scale_dit.data.parser import summarise
from scale_dit.data.scene_batches import held_out_scenes
from scale_dit.data.scenes import Scene, render
from scale_dit.evaluation.detail import detail_score
from scale_dit.evaluation.studies import add_rows, scene_batches, scene_scores, score_drafts
from scale_dit.pipeline import ScaleDiTPipeline

SCALE = 4.0
KEYS = ("stage", "lora", "guidance_scale", "start")


class Study:
    """Drafts and pictures of the same scenes and seeds at several settings."""

    def __init__(self, pipeline: ScaleDiTPipeline, scenes: Sequence[Scene], batch: int):
        self.pipeline, self.scenes, self.batch = pipeline, scenes, batch
        self.side = round(pipeline.settings.native * SCALE)

    def drafts(self, guidance_scale: float | None = None) -> tuple[list[Tensor], dict[str, float]]:
        """Latents of the drafts, a tensor a batch, and their accuracies."""
        return score_drafts(self.pipeline, self.scenes, self.batch, SCALE, guidance_scale)

    def pictures(self, drafts: Sequence[Tensor], guidance_scale: float, start: float) -> dict[str, float]:
        """Accuracies and detail of the large pictures over these drafts."""
        scores, details = [], []
        for (part, prompts, generators), draft in zip(scene_batches(self.scenes, self.batch), drafts, strict=True):
            images = self.pipeline(
                prompts, self.side, self.side, guidance_scale=guidance_scale, start=start, scale=SCALE,
                generator=generators, draft_latents=draft, output_type="pt",
            ).images  # fmt: skip
            scores += scene_scores(part, images)
            truth = render(part, self.side, self.side, images.device)
            details += detail_score(images.cpu(), truth.cpu(), SCALE).tolist()
        return summarise(scores) | {"detail": sum(details) / len(details)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="assets/tiny-flux")
    parser.add_argument("--lora", help="study the refinement with this LoRA, or `none`; without it, drafts alone")
    parser.add_argument("--draft-scales", type=float, nargs="+", default=[1.0, 1.5, 2.0, 2.5, 3.0, 4.0])
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0])
    parser.add_argument("--starts", type=float, nargs="+", default=[1.0, 0.7])
    parser.add_argument("--n", type=int, default=200, help="scenes")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--to", type=Path, default=Path(__file__).with_name("results.csv"))
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = ScaleDiTPipeline.from_pretrained(options.base).to(device)
    study = Study(pipeline, held_out_scenes(options.n, split="validation"), options.batch)

    def record(stage: str, guidance_scale: float, start: float | str, summary: dict[str, float]) -> None:
        lora = options.lora if stage == "refinement" else ""
        row = {"stage": stage, "lora": lora, "guidance_scale": guidance_scale, "start": start}
        row |= {name: f"{summary[f'{name}_accuracy']:.4f}" for name in ("count", "colour", "shape", "place")}
        row |= {"detail": f"{summary['detail']:.4f}" if "detail" in summary else "", "n": options.n}
        print(*row.values(), flush=True)
        add_rows(options.to, [row], KEYS)

    if not options.lora:
        for guidance_scale in options.draft_scales:
            record("draft", guidance_scale, "", study.drafts(guidance_scale)[1])
        return
    drafts, summary = study.drafts(pipeline.settings.guidance_scale)
    record("draft", pipeline.settings.guidance_scale, "", summary)
    if options.lora != "none":
        pipeline.load_lora_weights(options.lora)
    for start in options.starts:
        for guidance_scale in options.scales:
            record("refinement", guidance_scale, start, study.pictures(drafts, guidance_scale, start))


if __name__ == "__main__":
    main()
