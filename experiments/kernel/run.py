"""Times of the attention kernels, from the benchmark's tables into README.md, its plots and the figures.

python src/benchmark.py kernel=attention        on a GPU, see README.md
python experiments/kernel/run.py
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

from scale_dit.benchmark.attention import HALOS, KEYS, layout_of
from scale_dit.errors import UserError
from scale_dit.evaluation.figures import FigureRow, figures_file, merge_rows, read_figures, rounded
from scale_dit.evaluation.quotes import update_document
from scale_dit.evaluation.studies import fill_table

HERE = Path(__file__).parent
ORDERS = ("raster", "hilbert", "window")
TILE = (128, 64)
TEXT = 512
CARD = ("machine", "versions", "date", "commit")
PROVENANCE = ("command", *CARD)
COLOURS = ("triton", "flex", "fa4", "sdpa", "dense_cudnn", "dense_flash", "masked", "reference")
STYLES = {"": "-", "joined": "--", "alone": ":"}
# Figure: unit, format, what it is, what it must be.
FIGURES = {
    "kernel_fwd_4k_ms": ("ms", ".2f", "forward, 4096 px, ms", "aim: 2.0"),
    "kernel_fwd_4k_tflops": ("TFLOP/s", ".0f", "the same, TFLOP/s", ""),
    "kernel_fwd_4k_vs_fa4": ("ratio", ".2f", "forward, 4096 px, over flash-attn-4", "below 1"),
    "kernel_fwd_4k_vs_fa4_joined": ("ratio", ".2f", "the same, over flash-attn-4 with cuDNN for the text rows", ""),
    "kernel_fwd_4k_vs_flex": ("ratio", ".2f", "forward, 4096 px, over FlexAttention", "at most 0.65"),
    "kernel_fwd_4k_vs_flex_joined": ("ratio", ".2f", "the same, over FlexAttention with cuDNN for the text rows", ""),
    "kernel_fwd_8k_over_4k": ("ratio", ".2f", "forward, 8192 px over 4096 px", "at most 4.1"),
    "kernel_fwdbwd_4k_ms": ("ms", ".1f", "forward and backward, 4096 px, ms", "aim: 10"),
    "kernel_fwdbwd_4k_vs_flex": ("ratio", ".2f", "with gradients, over FlexAttention", "at most 0.6"),
    "kernel_fwdbwd_4k_vs_flex_joined": ("ratio", ".2f", "the same, with cuDNN for the text rows", ""),
    "kernel_fwd_4k_speedup_vs_dense_cudnn": ("ratio", ".1f", "dense cuDNN over ours, forward, 4096 px", "at least 30"),
    "kernel_fwd_4k_extra_mib": ("MiB", ".0f", "memory beside inputs and output, MiB", "below 64"),
}

Row = Mapping[str, str]
Key = tuple[int, str, str, str, str]
"""Size in px, pattern, order, backend and pass."""


def read(path: Path) -> list[Row]:
    """The rows of a table of the benchmark, all of one card, day and commit.

    Raises:
        UserError: there is no such table, or its rows were measured in different places.
    """
    if not path.is_file():
        raise UserError(f"there is no {path}: write it with python src/benchmark.py kernel={path.stem}, on a GPU")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    check_alike(rows, CARD, str(path))
    return rows


def check_alike(rows: Sequence[Row], columns: Sequence[str], where: str) -> None:
    """Refuse rows that must not be compared.

    Raises:
        UserError: they differ in one of the columns.
    """
    for column in columns:
        if len(found := sorted({row[column] for row in rows})) > 1:
            raise UserError(
                f"rows of {where} differ in {column} ({'; '.join(found)}), but they are compared with each other: "
                f"delete the older ones, or measure all anew"
            )


def by_key(rows: Sequence[Row]) -> dict[Key, Row]:
    """Rows by what they measured.

    Raises:
        UserError: two rows measured the same.
    """
    found: dict[Key, Row] = {}
    for row in rows:
        px, *names = (row[key] for key in KEYS)
        key = (int(px), *names)
        if key in found:
            raise UserError(f"two rows measured {', '.join(map(str, key))}: delete the older one")
        found[key] = row
    return found


def figures(table: Mapping[Key, Row]) -> list[FigureRow]:
    """Those that can be had from the rows that there are, of pattern `disjoint` in the order by windows.

    Raises:
        UserError: the rows that they come from are not of one run.
    """

    def row(backend: str, px: int = 4096, kind: str = "forward") -> Row | None:
        return table.get((px, "disjoint", "window", backend, kind))

    ours, with_gradients = row("triton"), row("triton", kind="forward_backward")
    sources: dict[str, tuple[Row | None, Row | None, str]] = {
        "kernel_fwd_4k_ms": (ours, None, "p50_ms"),
        "kernel_fwd_4k_tflops": (ours, None, "tflops"),
        "kernel_fwd_4k_vs_fa4": (ours, row("fa4_alone"), "p50_ms"),
        "kernel_fwd_4k_vs_fa4_joined": (ours, row("fa4_joined"), "p50_ms"),
        "kernel_fwd_4k_vs_flex": (ours, row("flex_alone"), "p50_ms"),
        "kernel_fwd_4k_vs_flex_joined": (ours, row("flex_joined"), "p50_ms"),
        "kernel_fwd_8k_over_4k": (row("triton", 8192), ours, "p50_ms"),
        "kernel_fwdbwd_4k_ms": (with_gradients, None, "p50_ms"),
        "kernel_fwdbwd_4k_vs_flex": (with_gradients, row("flex_alone", kind="forward_backward"), "p50_ms"),
        "kernel_fwdbwd_4k_vs_flex_joined": (with_gradients, row("flex_joined", kind="forward_backward"), "p50_ms"),
        "kernel_fwd_4k_speedup_vs_dense_cudnn": (row("dense_cudnn"), ours, "p50_ms"),
        "kernel_fwd_4k_extra_mib": (ours, None, "extra_mib"),
    }
    needs_two = {name for name in FIGURES if FIGURES[name][0] == "ratio"}
    found = []
    for name, (above, below, column) in sources.items():
        if above is None or (name in needs_two and below is None):
            print(f"{name}: not measured")
            continue
        check_alike([above, below or above], PROVENANCE, name)
        value = float(above[column]) / (float(below[column]) if below else 1)
        is_time = FIGURES[name][0] == "ms"
        low, high = (rounded(float(above[end])) if is_time else None for end in ("p20_ms", "p80_ms"))
        where = {key: above[key] for key in PROVENANCE}
        found.append(FigureRow(name, rounded(value), FIGURES[name][0], low, high, int(above["rounds"]), **where))
    return found


def write_tables(
    table: Mapping[Key, Row], rotations: Sequence[Row], wide: Sequence[Row], measured: Sequence[FigureRow]
) -> None:
    """All tables of README.md, and the numbers quoted in them."""
    readme = HERE / "README.md"
    quoted = [
        [label, f"<!-- figure:{name} {form} --><!-- /figure -->", bar]
        for name, (_, form, label, bar) in FIGURES.items()
        if name in {figure.name for figure in measured}
    ]
    fill_table(readme, ["", "measured", "must be"], quoted, "figures")

    windows = {key: row for key, row in table.items() if key[2] == "window"}
    sizes = sorted({key[0] for key in windows})
    lines = []
    for pattern, kind, backend in product(HALOS, *(dict.fromkeys(key[place] for key in windows) for place in (4, 3))):
        found = [windows.get((px, pattern, "window", backend, kind)) for px in sizes]
        if any(found):
            cells = [f"{short(float(row['p50_ms']))} ({float(row['tflops']):.0f})" if row else "" for row in found]
            lines.append([pattern, kind.replace("_", " + "), backend, *cells])
    plot = "![Time against the side of the picture](times.png)"
    fill_table(readme, ["pattern", "pass", "", *(f"{px} px" for px in sizes)], lines, "times", plot)

    lines = [
        [
            pattern, kind.replace("_", " + "), backend, f"{row['p50_ms']} ({row['p20_ms']} to {row['p80_ms']})",
            row["host_ms"], row["share_of_gemm"], row["roofline_ms"], row["flop_per_byte"], row["extra_mib"],
            row["output_error"], row["gradient_error"], row["settings"],
        ]
        for (px, pattern, _, backend, kind), row in windows.items()
        if px == 4096
    ]  # fmt: skip
    header = ["pattern", "pass", "", "ms (p20 to p80)", "launch, ms", "of GEMM rate", "roofline, ms", "FLOP / byte",
              "extra MiB", "error", "of gradients", "settings"]  # fmt: skip
    fill_table(readme, header, lines, "details")

    lines = []
    for px, pattern in ordered(table):
        for order, (visited, masked, row) in orders_of(table, px, pattern).items():
            each = 1000 * float(row["p50_ms"]) / visited
            cells = [f"{visited:,}", f"{masked:,}", row["p50_ms"], f"{each:.3f}"]
            lines.append([f"{px}", pattern, order, *cells])
    if lines:
        header = ["px", "pattern", "order", "tiles", "masked", "ms", "ms a 1,000 tiles"]
        plot = "![Visited tiles and time by order](orders.png)"
        fill_table(readme, header, lines, "orders", plot)

    names = list(dict.fromkeys(row["implementation"] for row in rotations))
    cases = {(row["px"], row["pass"], row["implementation"]): row for row in rotations}
    lines = [
        [px, kind.replace("_", " + "), *(f"{cases[px, kind, name]['p50_ms']} ({cases[px, kind, name]['gb_per_s']})"
                                         for name in names)]
        for px, kind in dict.fromkeys((row["px"], row["pass"]) for row in rotations)
    ]  # fmt: skip
    fill_table(readme, ["px", "pass", *names], lines, "rotation")

    header = ["px", "", "ms of 32,768 queries", "TFLOP/s", "s a picture"]
    columns = ("px", "implementation", "p50_ms", "tflops", "picture_s")
    fill_table(readme, header, [[row[column] for column in columns] for row in wide], "wide")
    update_document(readme, read_figures(figures_file()))


def short(ms: float) -> str:
    """Three digits, and all those before the point."""
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}"


def ordered(table: Mapping[Key, Row]) -> list[tuple[int, str]]:
    """Sizes and patterns at which our forward pass was timed in every order."""
    cases = product(sorted({key[0] for key in table}), HALOS)
    return [case for case in cases if all((*case, order, "triton", "forward") in table for order in ORDERS)]


def orders_of(table: Mapping[Key, Row], px: int, pattern: str) -> dict[str, tuple[int, int, Row]]:
    """By order: tiles of one head's image rows, how many of them need a mask, and the row of our forward pass."""
    found = {}
    for order in ORDERS:
        tiles = layout_of(px, pattern, order, TEXT).tiles(*TILE)
        visited, full = len(tiles.query), int(tiles.is_full.sum())
        found[order] = (visited, visited - full, table[px, pattern, order, "triton", "forward"])
    return found


def plot_times(table: Mapping[Key, Row]) -> None:
    """Time against picture size, a line for each backend; patterns down, passes across."""
    from matplotlib import pyplot

    kinds = ("forward", "forward_backward")
    figure, panels = pyplot.subplots(len(HALOS), 2, figsize=(10, 7), sharex=True, sharey="col", layout="constrained")
    sizes = sorted({key[0] for key in table})
    for (place, pattern), (column, kind) in product(enumerate(HALOS), enumerate(kinds)):
        panel = panels[place][column]
        for backend in dict.fromkeys(key[3] for key in table):
            keys = [key for key in table if key[1:] == (pattern, "window", backend, kind)]
            points = sorted((key[0], float(table[key]["p50_ms"])) for key in keys)
            if points:
                library, _, kind_of_call = backend.partition("_")
                is_dense = library == "dense"
                colour = COLOURS.index(backend if is_dense else library)
                style = STYLES["" if is_dense else kind_of_call]
                panel.plot(*zip(*points, strict=True), style, marker="o", color=f"C{colour}", label=backend)
        panel.set(title=f"{pattern}, {kind.replace('_', ' + ')}", xscale="log", yscale="log", ylabel="ms")
        panel.set_xticks(sizes, [str(px) for px in sizes])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    for panel in panels[-1]:
        panel.set_xlabel("side of the picture (px)")
    panels[0][0].legend(fontsize=8)
    figure.savefig(HERE / "times.png", dpi=110)


def plot_orders(table: Mapping[Key, Row]) -> None:
    """Visited tiles and measured time against picture size, a line for each order; patterns down."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(len(HALOS), 2, figsize=(8, 6), sharex=True, layout="constrained")
    for place, pattern in enumerate(HALOS):
        sizes = [px for px, each in ordered(table) if each == pattern]
        counted = {px: orders_of(table, px, pattern) for px in sizes}
        for order, style in zip(ORDERS, ("-", "-", "x--"), strict=True):  # two often lie upon each other
            tiles = [counted[px][order][0] for px in sizes]
            times = [float(counted[px][order][2]["p50_ms"]) for px in sizes]
            for panel, values in zip(panels[place], (tiles, times), strict=True):
                panel.plot(sizes, values, style, label=order)
        for panel, label in zip(panels[place], ("visited tiles of 128 x 64", "ms, forward"), strict=True):
            panel.set(title=pattern, xscale="log", yscale="log", ylabel=label)
            panel.set_xticks(sizes, [str(px) for px in sizes])
            panel.minorticks_off()
    for panel in panels[-1]:
        panel.set_xlabel("side of the picture (px)")
    panels[0][0].legend()
    figure.savefig(HERE / "orders.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = sorted(HERE.glob("attention*.csv")) or [HERE / "attention.csv"]
    parser.add_argument("--attention", type=Path, nargs="+", default=tables, help="tables of kernel=attention")
    parser.add_argument("--rotation", type=Path, default=HERE / "norm_rotate.csv", help="table of kernel=norm_rotate")
    parser.add_argument("--wide", type=Path, default=HERE / "wide_attention.csv", help="table of kernel=wide_attention")
    options = parser.parse_args()
    table = by_key([row for path in options.attention for row in read(path)])
    rotations, wide = read(options.rotation), read(options.wide)
    measured = figures(table)
    merge_rows(measured, figures_file())
    write_tables(table, rotations, wide, measured)
    plot_times(table)
    if ordered(table):
        plot_orders(table)


if __name__ == "__main__":
    main()
