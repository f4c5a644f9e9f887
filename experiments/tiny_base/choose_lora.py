"""Keep the LoRA with the lowest training loss among runs that differ in nothing but a setting of the optimiser.

python experiments/tiny_base/choose_lora.py RUN_FOLDER ... --to FOLDER
"""

from __future__ import annotations

import argparse
import csv
import shutil
from pathlib import Path


def losses(folder: Path) -> dict[int, float]:
    """Training loss by step."""
    with next(folder.rglob("metrics.csv")).open(newline="", encoding="utf-8") as file:
        return {int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders of src/train.py")
    parser.add_argument("--to", type=Path, required=True)
    options = parser.parse_args()
    if unfinished := [str(run) for run in options.runs if not (run / "lora").is_dir()]:
        raise SystemExit("these runs left no LoRA, so there is no choice: " + ", ".join(unfinished))
    curves = {run: losses(run) for run in options.runs}
    shared = sorted(set.intersection(*(set(curve) for curve in curves.values())))
    last = shared[-max(1, len(shared) // 4) :]
    means = {run: sum(curve[step] for step in last) / len(last) for run, curve in curves.items()}
    for run, mean in sorted(means.items(), key=lambda each: each[1]):
        print(f"{mean:.5f} {run} (mean loss of {len(last)} logged steps up to {last[-1]})")
    shutil.copytree(min(means, key=means.__getitem__) / "lora", options.to, dirs_exist_ok=True)


if __name__ == "__main__":
    main()
