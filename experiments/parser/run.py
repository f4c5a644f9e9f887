"""How the scene parser degrades with blur and noise. Writes results.csv and the table in README.md beside this file.

python experiments/parser/run.py
"""

from __future__ import annotations

import argparse
import csv
import datetime
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from scipy import ndimage

from scale_dit.data.parser import SceneScore, parse, score, summarise
from scale_dit.data.scenes import render, sample_scene
from scale_dit.evaluation.figures import record_figure
from scale_dit.evaluation.intervals import wilson
from scale_dit.evaluation.studies import fill_table
from scale_dit.provenance import commit, machine

HERE = Path(__file__).parent
SIDES = (256, 1024)
BLURS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0)
NOISES = (0.0, 0.1, 0.2, 0.4)
ACCURACIES = ("count", "colour", "place", "shape", "relation")


def conditions(picture: np.ndarray, clean_only: bool, seed: int) -> Iterator[tuple[float, float, np.ndarray]]:
    """Blur sigma (px of a 256 px picture), noise sigma, and the picture so damaged."""
    yield 0.0, 0.0, picture
    if clean_only:
        return
    noise = np.random.default_rng(seed).standard_normal(picture.shape, dtype=np.float32)
    scale = min(picture.shape[1:]) / 256
    for blur in BLURS:
        blurred = ndimage.gaussian_filter(picture, (0, blur * scale, blur * scale), truncate=3.0)
        for level in NOISES:
            if blur or level:
                yield blur, level, blurred + np.float32(level) * noise


def measure(side: int, clean: int, damaged: int) -> dict[tuple[float, float], list[SceneScore]]:
    """Scores of test scenes at one resolution: ``clean`` of them as they are, the first ``damaged`` of them damaged."""
    scores: dict[tuple[float, float], list[SceneScore]] = defaultdict(list)
    for seed in track(range(clean), f"{side} px"):
        scene = sample_scene(seed, "test", zoom=1.0)
        picture = render([scene], side, side)[0].numpy()
        for blur, noise, seen in conditions(picture, seed >= damaged, seed):
            scores[blur, noise].append(score(scene, parse(torch.from_numpy(seen))))
    return scores


def write_results(rows: list[dict[str, object]]) -> None:
    with (HERE / "results.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_table(rows: list[dict[str, object]]) -> None:
    """Put the results between the marks in README.md."""
    header = ["resolution (px)", "blur sigma", "noise sigma", *(f"{name} %" for name in ACCURACIES), "pictures"]
    lines = []
    for row in rows:
        shares = (f"{100 * float(str(row[name])):.1f}" for name in ACCURACIES)
        settings = (str(row["resolution"]), f"{row['blur_sigma']:g}", f"{row['noise_sigma']:g}")
        lines.append([*settings, *shares, str(row["n"])])
    fill_table(HERE / "README.md", header, lines)


def record_clean(side: int, scores: list[SceneScore]) -> None:
    """Rows of experiments/figures.csv for the clean renders of one resolution."""
    for name, attribute in (("count", "count_correct"), ("colour", "colours_correct")):
        right = sum(getattr(item, attribute) for item in scores)
        low, high = wilson(right, len(scores))
        record_figure(f"parser_{name}_accuracy_{side}", right / len(scores), "share", low, high, len(scores))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clean", type=int, default=200, help="undamaged pictures per resolution")
    parser.add_argument("--damaged", type=int, default=30, help="of these, pictures that are also damaged")
    parser.add_argument("--dry", action="store_true", help="print the rows, write nothing")
    options = parser.parse_args()
    where = {"machine": machine(), "commit": commit(), "date": datetime.datetime.now(datetime.UTC).date().isoformat()}
    rows: list[dict[str, object]] = []
    for side in SIDES:
        scores = measure(side, options.clean, options.damaged)
        for (blur, noise), items in sorted(scores.items()):
            summary = summarise(items)
            values = {name: round(summary[f"{name}_accuracy"], 4) for name in ACCURACIES}
            rows.append(
                {"resolution": side, "blur_sigma": blur, "noise_sigma": noise, **values, "n": len(items), **where}
            )
        if not options.dry:
            record_clean(side, scores[0.0, 0.0])
    if options.dry:
        print(*rows, sep="\n")
        return
    write_results(rows)
    write_table(rows)


if __name__ == "__main__":
    main()
