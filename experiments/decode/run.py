"""What ways to decode differ in, from the table of measure.py into README.md and the figures, and where errors lie.

python experiments/decode/measure.py ...        see README.md
python experiments/decode/run.py                two minutes on two cores
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from measure import STOCK_TILES, TILES, autoencoder, latents_of, stock_tiles

from scale_dit.autoencoder import Decoding, decode
from scale_dit.evaluation.figures import FigureRow, figures_file, merge_rows, read_figures, rounded
from scale_dit.evaluation.quotes import update_document
from scale_dit.evaluation.studies import fill_table

HERE = Path(__file__).parent
PICTURE_PX = 1024
PROVENANCE = ("command", "machine", "versions", "commit", "date")
NAMES = {"tiny": "Embedded base, float32", "flux1": "FLUX.1's shape, bfloat16, random weights"}
COLUMNS = {
    "px": "px", "mode": "mode", "seconds": "seconds", "peak_gb": "peak GB", "planned_gb": "told GB",
    "max_error": "largest error", "rms_error": "rms error", "seams": "seams",
}  # fmt: skip
ERRORS = ("px", "mode", "max_error", "rms_error", "seams")
FIGURES = {
    "decode_streamed_max_error": ("streamed", "max_error"),
    "decode_tiled_max_error": ("tiled", "max_error"),
    "decode_tiled_rms_error": ("tiled", "rms_error"),
    "decode_stock_tiles_max_error": (STOCK_TILES, "max_error"),
    "decode_stock_tiles_rms_error": (STOCK_TILES, "rms_error"),
}
"""Mode and column of the embedded base's rows at `PICTURE_PX`."""

Row = Mapping[str, str]


def read() -> list[Row]:
    """The measured rows."""
    with (HERE / "results.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def figures(rows: Sequence[Row]) -> list[FigureRow]:
    """Errors against the untiled decoder, in levels of 8 bits."""
    found = {row["mode"]: row for row in rows if (row["base"], row["px"]) == ("tiny", str(PICTURE_PX))}
    return [
        FigureRow(
            name, rounded(float(found[mode][column])), "levels of 255", None, None, 1,
            **{key: found[mode][key] for key in PROVENANCE},
        )
        for name, (mode, column) in FIGURES.items()
    ]  # fmt: skip


def write_tables(rows: Sequence[Row]) -> None:
    """A table for each autoencoder that was measured."""
    for base, name in NAMES.items():
        mine = [row for row in rows if row["base"] == base]
        if not mine:
            continue
        columns = ERRORS if base == "tiny" else tuple(COLUMNS)
        machines = "; ".join(sorted({row["machine"] for row in mine}))
        lines = [[row[column] for column in columns] for row in mine]
        fill_table(HERE / "README.md", [COLUMNS[column] for column in columns], lines, base, f"{name}, on {machines}.")


@torch.no_grad()
def draw(px: int = PICTURE_PX) -> None:
    """A scene, and how far tiles are from it: diffusers' own and ours, in levels of 255."""
    from matplotlib import pyplot

    cpu, (tile, overlap) = torch.device("cpu"), TILES["tiny"]
    vae = autoencoder("tiny", cpu)
    latents = latents_of("tiny", vae, px, cpu)
    whole = decode(vae, latents, Decoding("whole"))
    ways = {
        f"{STOCK_TILES}: error": stock_tiles(vae, latents, tile),
        "tiled: error": decode(vae, latents, Decoding("tiled", tile=tile, overlap=overlap)),
    }
    figure, panels = pyplot.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    panels[0].imshow(whole[0].permute(1, 2, 0).numpy())
    panels[0].set_title(f"{px} px, whole")
    for panel, (name, picture) in zip(panels[1:], ways.items(), strict=True):
        error = (picture - whole)[0].abs().mean(0) * 255
        shown = panel.imshow(error.numpy(), vmin=0, vmax=8, cmap="magma")
        panel.set_title(name)
    figure.colorbar(shown, ax=list(panels[1:]), label="levels of 255")
    for panel in panels:
        panel.set_axis_off()
    figure.savefig(HERE / "errors.png", dpi=80)


def main() -> None:
    rows = read()
    merge_rows(figures(rows), figures_file())
    write_tables(rows)
    update_document(HERE / "README.md", read_figures())
    draw()


if __name__ == "__main__":
    main()
