"""What does the order of tokens in memory save? Tiles that a kernel visits, from the layout alone.

python experiments/orders/run.py        half a minute on two cores
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

from scale_dit.benchmark.attention import HALOS
from scale_dit.evaluation.figures import record_figure
from scale_dit.evaluation.studies import add_rows, fill_table
from scale_dit.grid import Grid
from scale_dit.layout import Layout

HERE = Path(__file__).parent
ORDERS = ("raster", "hilbert", "window")
WINDOWS = (8, 16, 32)
TILES = ((64, 64), (128, 64), (128, 128))
KERNEL_TILE = (128, 64)
SIZES = {"4096 x 4096": (256, 256), "3840 x 2160": (135, 240)}
"""Rows and columns of tokens by size in px; the second is ragged and no power of 2."""
KEYS = ("size", "order", "window", "pattern", "block_m", "block_n")


def count(size: str, order: str, window: int, pattern: str, tile: tuple[int, int]) -> dict[str, object]:
    """Tiles of the image rows of one head, and how much of what they compute is wanted."""
    height, width = SIZES[size]
    draft = Grid(-(-height // 4), -(-width // 4), 8)
    layout = Layout(512, Grid(height, width, 8), draft, window=window, halo=HALOS[pattern], order=order)
    tiles = layout.tiles(*tile)
    pairs = sum(layout.attention_pairs()[1:])
    visited = len(tiles.query)
    return dict(zip(KEYS, (size, order, window, pattern, *tile), strict=True)) | {
        "visited": visited,
        "full": int(tiles.is_full.sum()),
        "wanted_share": f"{pairs / (visited * tile[0] * tile[1]):.4f}",
    }


def write_table(rows: list[dict[str, object]]) -> None:
    """Put the kernel's tile between the marks in README.md: a row for each window and pattern."""
    lines = []
    for size, window, pattern in product(SIZES, WINDOWS, HALOS):
        cells = []
        for order in ORDERS:
            (row,) = (row for row in rows if [row[key] for key in KEYS] == [size, order, window, pattern, *KERNEL_TILE])
            partial = int(str(row["visited"])) - int(str(row["full"]))
            cells.append(f"{row['visited']:,} ({partial:,} masked), {float(str(row['wanted_share'])):.0%}")
        lines.append([size, str(window), pattern, *cells])
    fill_table(HERE / "README.md", ["size", "window", "pattern", *ORDERS], lines)


def plot(rows: list[dict[str, object]]) -> None:
    """Visited tiles at 4096 px by window, a line for each order, a panel for each pattern."""
    rows = [row for row in rows if row["size"] == "4096 x 4096"]
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(HALOS), figsize=(8, 3.2), sharey=True, layout="constrained")
    for panel, pattern in zip(panels, HALOS, strict=True):
        for order in ORDERS:
            chosen = [
                row for row in rows
                if (row["order"], row["pattern"], row["block_m"], row["block_n"]) == (order, pattern, *KERNEL_TILE)
            ]  # fmt: skip
            panel.plot([row["window"] for row in chosen], [row["visited"] for row in chosen], marker="o", label=order)
        panel.set(title=pattern, xlabel="window (tokens)", xscale="log", yscale="log", xticks=WINDOWS)
        panel.set_xticks(WINDOWS, [str(window) for window in WINDOWS])
        panel.minorticks_off()
    panels[0].set_ylabel("visited tiles of 128 x 64")
    panels[0].legend()
    figure.savefig(HERE / "tiles.png", dpi=110)


def main() -> None:
    rows = [count(*case) for case in product(SIZES, ORDERS, WINDOWS, HALOS, TILES)]
    add_rows(HERE / "results.csv", rows, KEYS)
    for row in rows:
        if [row[key] for key in KEYS if key != "order"] == ["4096 x 4096", 16, "disjoint", *KERNEL_TILE]:
            record_figure(f"tiles_{row['order']}_4k", float(str(row["visited"])), "tiles")
    write_table(rows)
    plot(rows)


if __name__ == "__main__":
    main()
