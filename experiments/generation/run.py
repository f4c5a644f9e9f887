"""Pictures of the embedded base for the documents, and what has to be equal in them.

python experiments/generation/run.py

Sizes and shapes (sizes.jpg), windows made anew, prompts for windows and joined edges (local_control.jpg), and an
interrupted run that goes on. About 20 minutes on two cores; pictures that are there already are not made again.
"""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from scale_dit.evaluation.studies import add_rows, fill_table
from scale_dit.picture_files import load_picture, read_provenance

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PICTURES = ROOT / "logs" / "generation"
PROMPT = "a large red circle left of a small blue star, on sand"
BRICKS = "a red ring and a blue star on a brick wall"
KEEP = "keep_latents=true"
COMMON = ("base=tiny", f"prompt={PROMPT}", "start=0.9")
SIZES = ((512, 512), (1024, 1024), (2048, 2048), (640, 1536), (1536, 640), (832, 1280))
"""Height and width in px; 1024 px square are four times the base's native side."""
TWO_STEPS = ("height=2048", "width=2048", "scale=4", "start=0.8")
"""Of a picture at twice the size over one of four times the native size, at the scale that the LoRA knows."""
FLECK = (704, 224, 776, 300)
RIGHT = '[{"box": [640, 0, 1024, 1024], "prompt": "a small blue star on grass"}]'
LEFT = '[{"box": [0, 0, 512, 1024], "prompt": "a large red dotted circle on sand"}]'


def generate(folder: str, *options: str) -> Path:
    """The picture of a command, made if it is not there."""
    output = PICTURES / folder
    found = sorted(output.glob("*.png"))
    if not found:
        subprocess.run([*_command(output), *options], cwd=ROOT, check=True)
        found = sorted(output.glob("*.png"))
    return found[0]


def interrupted(folder: str, *options: str) -> Path:
    """The picture of a command that Ctrl-C ends after some steps, and that goes on."""
    output = PICTURES / folder
    latents = output / "latents" / "00000_seed0.refine.safetensors"
    if not (output / "00000_seed0.png").is_file():
        started = subprocess.Popen([*_command(output), *options, "save_every=1"], cwd=ROOT, preexec_fn=_take_ctrl_c)
        while not latents.is_file() and started.poll() is None:
            time.sleep(0.2)
        started.send_signal(signal.SIGINT)
        if started.wait() != 130:
            raise SystemExit(f"{folder}: the run ended before it was interrupted")
        subprocess.run([sys.executable, "src/generate.py", f"resume={output}"], cwd=ROOT, check=True)
    return output / "00000_seed0.png"


def _command(output: Path) -> list[str]:
    return [sys.executable, "src/generate.py", f"output={output}", f"hydra.run.dir={output}"]


def _take_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def digest(file: Path) -> str:
    """Of a picture's pixels."""
    return hashlib.sha256(load_picture(file).numpy().tobytes()).hexdigest()[:16]


def sheet(panels: Iterable[tuple[str, Image.Image]], height: int, columns: int, file: Path) -> None:
    """Panels of one height with captions, row by row."""
    pictures = [
        (caption, panel.resize((round(panel.width * height / panel.height), height), Image.Resampling.LANCZOS))
        for caption, panel in panels
    ]
    rows = [pictures[first : first + columns] for first in range(0, len(pictures), columns)]
    width = max(sum(panel.width + 8 for _, panel in row) for row in rows)
    page = Image.new("RGB", (width, len(rows) * (height + 28)), "white")
    for place, row in enumerate(rows):
        left, top = 0, place * (height + 28)
        for caption, panel in row:
            page.paste(panel, (left, top))
            ImageDraw.Draw(page).text((left + 4, top + height + 6), caption, fill="black")
            left += panel.width + 8
    page.save(file, quality=90)


def marked(file: Path, *boxes: tuple[int, int, int, int]) -> Image.Image:
    """A picture with boxes drawn on it."""
    picture = Image.open(file).convert("RGB")
    for box in boxes:
        ImageDraw.Draw(picture).rectangle(box, outline="white", width=4)
    return picture


def beside_itself(file: Path) -> Image.Image:
    """Four of a picture, so that its edges meet in the middle."""
    return Image.fromarray(np.tile(np.asarray(Image.open(file).convert("RGB")), (2, 2, 1)))


def main() -> None:
    made = {
        (height, width): generate(f"{height}x{width}", *COMMON, f"height={height}", f"width={width}", KEEP)
        for height, width in SIZES
    }
    first = made[1024, 1024]
    two = generate("two_steps", *COMMON[:2], f"draft={first}", *TWO_STEPS)
    panels = [(f"{width} x {height}", Image.open(file)) for (height, width), file in made.items()]
    sheet([*panels, ("2048 x 2048 over 1024 x 1024", Image.open(two))], 320, 4, HERE / "sizes.jpg")

    box = ",".join(map(str, FLECK))
    remade = generate("remade", f"remake={first}", f"boxes=[[{box}]]", "prompt=sand", "keep_latents=false")
    right, left = (
        generate(name, *COMMON[:2], "seed=3", f"window_prompts={text}")
        for name, text in (("right", RIGHT), ("left", LEFT))
    )
    edges, joined = (
        generate(name, COMMON[0], f"prompt={BRICKS}", "start=0.9", "seed=1", f"wrap={wrap}")
        for name, wrap in (("edges", "none"), ("joined", "both"))
    )
    sheet(
        [
            ("a picture, and the box of a fleck", marked(first, FLECK)),
            ("its window made anew with prompt=sand", Image.open(remade)),
            ("left half: a large red dotted circle on sand", Image.open(left)),
            ("right of the circle: a small blue star on grass", Image.open(right)),
            ("wrap=none, laid beside itself", beside_itself(edges)),
            ("wrap=both, laid beside itself", beside_itself(joined)),
        ],
        512, 2, HERE / "local_control.jpg",
    )  # fmt: skip
    again = interrupted("resumed", *COMMON, "height=1024", "width=1024")
    rows = results(first, remade, again)
    add_rows(HERE / "results.csv", rows, ["what"])
    fill_table(HERE / "README.md", ["what", "value"], [[row["what"], row["value"]] for row in rows])


def results(first: Path, remade: Path, resumed: Path) -> list[dict[str, str]]:
    """What has to be equal, as rows of a table."""
    change = (load_picture(first) != load_picture(remade)).any(0)
    rows, columns = (torch.nonzero(change.any(axis))[:, 0] for axis in (1, 0))
    inside = f"rows {rows.min()}-{rows.max()}, columns {columns.min()}-{columns.max()}"
    whole, part = (read_provenance(file)["seconds"]["refine"] for file in (first, remade))  # type: ignore[index]
    found = {
        "picture, undisturbed": digest(first),
        "picture, interrupted with Ctrl-C and resumed": digest(resumed),
        f"pixels that differ after the window at {list(FLECK)} was made anew": inside,
        "seconds of refinement: whole picture, one window": f"{whole:.0f}, {part:.0f}",
    }
    if digest(first) != digest(resumed):
        raise SystemExit("the resumed picture is another one")
    return [{"what": what, "value": value} for what, value in found.items()]


if __name__ == "__main__":
    main()
