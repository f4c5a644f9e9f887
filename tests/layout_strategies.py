"""Random layouts for property tests."""

from __future__ import annotations

from hypothesis import strategies as st

from scale_dit.grid import Grid
from scale_dit.layout import Layout


@st.composite
def layouts(draw) -> Layout:
    """Small layouts of every kind: ragged, shifted, with halos, without text or guidance."""
    cell = draw(st.sampled_from([1, 2, 3]))
    image = Grid(draw(st.integers(1, 14)), draw(st.integers(1, 14)), cell)
    guidance = draw(st.none() | st.builds(Grid, st.integers(1, 7), st.integers(1, 7), st.just(cell)))
    window = draw(st.none() | st.integers(1, max(image.cells_high, image.cells_wide)))
    return Layout(
        text=draw(st.integers(0, 3)),
        image=image,
        guidance=guidance,
        window=window and window * cell,
        halo=draw(st.integers(0, 2)) * cell,
        shift=draw(st.integers(0, (window or 1) - 1)) * cell,
        scope=draw(st.sampled_from(["aligned", "global"])),
        text_reads_image=draw(st.booleans()),
        order=draw(st.sampled_from(["raster", "window", "hilbert"])),
    )
