"""Which guidance scales suit the embedded base's drafts, and the refinement that reads them? On the validation split.

python experiments/guidance_scale/run.py                       minutes on a GPU
python experiments/guidance_scale/run.py --lora LORA --n 16    hours on two cores
"""

from __future__ import annotations

import argparse
import csv
import datetime
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from scale_dit.data.captions import caption
from scale_dit.data.parser import SceneScore, parse, score, summarise
from scale_dit.data.scene_batches import held_out_scenes
from scale_dit.data.scenes import Scene, render
from scale_dit.evaluation.detail import detail_score
from scale_dit.pipeline import ScaleDiTPipeline
from scale_dit.provenance import commit, machine, running_command, versions_line

SCALE = 4.0
COLUMNS = ("stage", "guidance_scale", "start", "count", "colour", "shape", "place", "detail", "n")


class Study:
    """Drafts and pictures of the same scenes and seeds at several settings."""

    def __init__(self, pipeline: ScaleDiTPipeline, scenes: Sequence[Scene], batch: int):
        self.pipeline, self.scenes, self.batch = pipeline, scenes, batch
        self.side = round(pipeline.settings.native * SCALE)

    def batches(self) -> list[tuple[Sequence[Scene], list[str], list[torch.Generator]]]:
        """Scenes, captions and fresh generators."""
        found = []
        for first in range(0, len(self.scenes), self.batch):
            part = self.scenes[first : first + self.batch]
            generators = [torch.Generator().manual_seed(first + offset) for offset in range(len(part))]
            found.append((part, [caption(scene, scene.seed) for scene in part], generators))
        return found

    def drafts(self, guidance_scale: float) -> tuple[list[Tensor], dict[str, float]]:
        """Latents of the drafts, a tensor a batch, and their accuracies."""
        latents, scores = [], []
        for part, prompts, generators in self.batches():
            made, _ = self.pipeline.make_drafts(
                prompts, self.side, self.side, SCALE, None, guidance_scale, generators
            )  # fmt: skip
            latents.append(made)
            scores += scored(part, self.pipeline.decode(made))
        return latents, summarise(scores)

    def pictures(self, drafts: Sequence[Tensor], guidance_scale: float, start: float) -> dict[str, float]:
        """Accuracies and detail of the large pictures over these drafts."""
        scores, details = [], []
        for (part, prompts, generators), draft in zip(self.batches(), drafts, strict=True):
            images = self.pipeline(
                prompts, self.side, self.side, guidance_scale=guidance_scale, start=start, scale=SCALE,
                generator=generators, draft_latents=draft, output_type="pt",
            ).images  # fmt: skip
            scores += scored(part, images)
            truth = render(part, self.side, self.side, images.device)
            details += detail_score(images.cpu(), truth.cpu(), SCALE).tolist()
        return summarise(scores) | {"detail": sum(details) / len(details)}


def scored(scenes: Sequence[Scene], pictures: Tensor) -> list[SceneScore]:
    return [score(scene, parse(picture.cpu())) for scene, picture in zip(scenes, pictures, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="assets/tiny-flux")
    parser.add_argument("--lora", help="study the refinement with this LoRA; without it, drafts alone")
    parser.add_argument("--draft-scales", type=float, nargs="+", default=[1.0, 1.5, 2.0, 2.5, 3.0, 4.0])
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 1.5, 2.5])
    parser.add_argument("--starts", type=float, nargs="+", default=[1.0, 0.7])
    parser.add_argument("--n", type=int, default=200, help="scenes")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--to", type=Path, default=Path(__file__).with_name("results.csv"))
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = ScaleDiTPipeline.from_pretrained(options.base).to(device)
    study = Study(pipeline, held_out_scenes(options.n, split="validation"), options.batch)
    where = [running_command(), machine(), versions_line(), datetime.date.today().isoformat(), commit()]
    with options.to.open("a" if options.to.exists() else "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if file.tell() == 0:
            writer.writerow([*COLUMNS, "command", "machine", "versions", "date", "commit"])

        def record(stage: str, guidance_scale: float, start: float | str, summary: dict[str, float]) -> None:
            values = [f"{summary[f'{name}_accuracy']:.4f}" for name in ("count", "colour", "shape", "place")]
            detail = f"{summary['detail']:.4f}" if "detail" in summary else ""
            row = [stage, guidance_scale, start, *values, detail, options.n]
            print(*row, flush=True)
            writer.writerow([*row, *where])
            file.flush()

        if not options.lora:
            for guidance_scale in options.draft_scales:
                record("draft", guidance_scale, "", study.drafts(guidance_scale)[1])
            return
        drafts, summary = study.drafts(pipeline.settings.guidance_scale)
        record("draft", pipeline.settings.guidance_scale, "", summary)
        pipeline.load_lora_weights(options.lora)
        for start in options.starts:
            for guidance_scale in options.scales:
                record("refinement", guidance_scale, start, study.pictures(drafts, guidance_scale, start))


if __name__ == "__main__":
    main()
