"""The layout against a plain restatement of the rule, and its costs against the published figures."""

from __future__ import annotations

import dataclasses
import math
import time
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from layout_strategies import layouts

from scale_dit.errors import UserError
from scale_dit.grid import Grid, guidance_grid
from scale_dit.layout import Layout

FLUX = {"heads": 24, "head_dim": 128}


def flux(pixels: int, **options) -> Layout:
    grid = Grid.from_pixels(pixels, pixels, token_size=16, cell=8)
    return Layout(512, grid, guidance_grid(grid, 4), window=16, **options)


def reads_image(layout: Layout, query: tuple, key: tuple) -> bool:
    """Whether an image token reads another, from the words of the design: same window, grown by the halo."""
    for side, q, k in zip((layout.image.height, layout.image.width), query, key, strict=True):
        if layout.window is not None:
            # Borders lie at shift + i * window, so the first window may be cut off on its left.
            left = (q - layout.shift) // layout.window * layout.window + layout.shift
            left, right = max(left, 0), min(left + layout.window, side)
            if not left - layout.halo <= k < right + layout.halo:
                return False
    return True


def reads_guidance(layout: Layout, query: tuple, key: tuple) -> bool:
    """Whether an image token reads a guidance token: the two cells an axis whose border is nearest to the centre."""
    if layout.scope == "global":
        return True
    axes = zip(
        (layout.image.height, layout.image.width),
        (layout.guidance.height, layout.guidance.width),
        query,
        key,
        strict=True,
    )
    for side, guidance_side, q, k in axes:
        window = layout.window or side
        left = (q - layout.shift) // window * window + layout.shift
        centre = Fraction(max(left, 0) + min(left + window, side), 2)
        cells = math.ceil(guidance_side / layout.image.cell)
        border = math.floor(centre / (Fraction(side, guidance_side) * layout.image.cell) + Fraction(1, 2))
        border = min(max(border, 1), max(cells - 1, 1))
        if k // layout.image.cell not in (border - 1, border):
            return False
    return True


@settings(deadline=None, max_examples=60)
@given(layouts(), st.data())
def test_a_box_reads_what_the_picture_reads_inside_it(layout, data):
    grid = layout.image
    rows, columns = (
        range(begin * grid.cell, data.draw(st.integers(begin * grid.cell + 1, side)))
        for side in (grid.height, grid.width)
        for begin in [data.draw(st.integers(0, (side - 1) // grid.cell))]
    )
    box = layout.box(rows, columns)
    raster = torch.arange(grid.tokens).view(grid.height, grid.width)[
        rows.start : rows.stop, columns.start : columns.stop
    ]
    tokens = raster.flatten()[box.image_order]
    places = layout.text + layout.image_order.argsort()[tokens]
    text, guidance = torch.arange(layout.text), torch.arange(layout.guidance_tokens) + layout.text + grid.tokens
    kept = torch.cat([text, places])
    assert torch.equal(box.dense_mask(), layout.dense_mask()[kept][:, torch.cat([kept, guidance])])
    assert type(box).from_json(box.json) == box


@pytest.mark.parametrize(
    ("rows", "columns", "words"),
    [
        (range(4, 16), range(8, 16), "Rows 4 to 16 are no box of a picture of 64: begin at a multiple of 8"),
        (range(0, 16), range(16, 72), "Columns 16 to 72 are no box"),
        (range(16, 16), range(0, 8), "Rows 16 to 16"),
    ],
)
def test_boxes_that_cannot_be_are_named(rows, columns, words):
    with pytest.raises(UserError, match=words):
        flux(1024).box(rows, columns)
    with pytest.raises(UserError, match="A box cannot be cut from a box"):
        flux(1024).box(range(0, 16), range(0, 16)).box(range(0, 8), range(0, 8))


@settings(deadline=None, max_examples=60)
@given(layouts())
@example(Layout(0, Grid(1, 9, 1), Grid(1, 7, 1), order="raster"))  # a centre just between two cells
def test_the_mask_is_the_rule(layout):
    mask = layout.dense_mask()
    text, image, guidance = layout.text, layout.image.tokens, layout.guidance_tokens
    assert mask.shape == (text + image, text + image + guidance)
    assert mask[:, :text].all()
    assert mask[:text, text : text + image].eq(layout.text_reads_image).all()
    assert not mask[:text, text + image :].any()

    places = [divmod(int(i), layout.image.width) for i in layout.image_order]
    expected = torch.tensor([[reads_image(layout, q, k) for k in places] for q in places])
    assert torch.equal(mask[text:, text : text + image], expected)
    if layout.guidance:
        draft = [divmod(int(i), layout.guidance.width) for i in layout.guidance_order]
        expected = torch.tensor([[reads_guidance(layout, q, k) for k in draft] for q in places])
        assert torch.equal(mask[text:, text + image :], expected)


@settings(deadline=None, max_examples=60)
@given(layouts())
def test_pairs_are_counted_without_the_mask(layout):
    mask, text, image = layout.dense_mask(), layout.text, layout.image.tokens
    assert tuple(layout.attention_pairs()) == (
        mask[:text].sum(),
        mask[text:, :text].sum(),
        mask[text:, text : text + image].sum(),
        mask[text:, text + image :].sum(),
    )


@settings(deadline=None, max_examples=60)
@given(layouts())
def test_groups_part_the_picture(layout):
    queries = torch.cat([group.queries.flatten() for group in layout.groups()])
    assert torch.equal(queries.sort().values, torch.arange(layout.image.tokens))
    for group in layout.groups():
        assert len(group.queries) == len(group.keys) == len(group.guidance)
        assert (group.queries[1:, 0] > group.queries[:-1, 0]).all()
        for places in group:
            assert (places.diff(dim=1) > 0).all(), "rows are ascending"


def test_a_halo_is_a_distance_that_every_token_reads():
    layout = Layout(0, Grid(24, 24, 4), window=8, halo=4, order="raster")
    mask = layout.dense_mask()
    y, x = torch.arange(576) // 24, torch.arange(576) % 24
    near = torch.maximum((y[:, None] - y).abs(), (x[:, None] - x).abs()) <= 4
    assert mask[near].all()


def test_the_guidance_pass_reads_own_and_adjacent_cells():
    layout = Layout.for_guidance(Grid(10, 6, 2), order="hilbert")
    y, x = (layout.image_order // 6) // 2, (layout.image_order % 6) // 2
    adjacent = ((y[:, None] - y).abs() <= 1) & ((x[:, None] - x).abs() <= 1)
    assert torch.equal(layout.dense_mask(), adjacent)
    assert Layout.for_guidance(Grid(10, 6, 2), reach="all").is_dense
    with pytest.raises(UserError, match=r"'none'.*adjacent, all"):
        Layout.for_guidance(Grid(10, 6, 2), reach="none")


def test_official_is_close_to_the_released_masks_published_cost():
    """GFLOP per layer, read from the paper's figure (so to about 1 %): within 1 % from 3K up, 5 % below.

    The released mask is dilated to blocks of 128 x 64 tokens, this one to cells: at small sizes, where most windows
    lie on an edge, the two are cut off differently.
    """
    published = {1024: 103, 2048: 433, 3072: 1016, 4096: 1800, 8192: 7390}
    for pixels, figure in published.items():
        measured = flux(pixels, halo=8).flops(**FLUX) / 1e9
        print(f"{pixels} px: {measured:,.0f} GFLOP, figure {figure:,}: {measured / figure - 1:+.1%}")
        assert measured == pytest.approx(figure, rel=0.01 if pixels >= 3072 else 0.05)


def test_the_released_block_mask_reads_1081_image_keys_a_row_where_official_reads_961():
    """Rows of 16-token windows, row by row: a query block is 8 x 16 tokens, a key block 4 x 16.

    A radius of 8 tokens dilated to those blocks reaches 8 tokens up and down and one whole window left and right.
    """
    windows = 256 // 16
    columns = sum(16 * (min(i + 2, windows) - max(i - 1, 0)) for i in range(windows)) / windows
    rows = sum(min(8 * i + 16, 256) - max(8 * i - 8, 0) for i in range(32)) / 32
    assert columns * rows == 1081
    assert flux(4096, halo=8).attention_pairs().image_to_image / 256**2 == 961


def test_disjoint_at_4k_costs_what_the_design_says():
    layout = flux(4096)
    pairs = layout.attention_pairs()
    per_pair = 4 * 24 * 128 / 1e12
    assert pairs.text_rows * per_pair == pytest.approx(0.416, abs=5e-4)
    assert sum(pairs[1:]) * per_pair == pytest.approx(0.825, abs=5e-4)
    assert layout.flops(**FLUX) == 4 * 3072 * (512 * (512 + 65_536) + 65_536 * (512 + 256 + 256))
    dense = Layout(512, layout.image).flops(**FLUX)
    assert dense / 1e12 == pytest.approx(54, abs=0.5)


def test_8k_is_counted_in_milliseconds():
    layout = flux(8192, halo=8)
    start = time.perf_counter()
    layout.flops(**FLUX)
    assert time.perf_counter() - start < 0.05


def test_a_layout_says_what_it_is():
    text = str(flux(4096, halo=8))
    assert "512 text, 256 x 256 image, 4096 guidance tokens" in text
    assert "512 text, 961 image and 256 guidance keys" in text


def test_a_dense_mask_of_a_large_picture_is_refused():
    with pytest.raises(UserError, match="66,048 x 70,144"):
        flux(4096).dense_mask()


def test_layouts_are_keys():
    assert flux(1024) == flux(1024)
    assert len({flux(1024), flux(1024), dataclasses.replace(flux(1024), shift=8)}) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 0}, "Window 0 .* use 4 or 8"),
        ({"window": -4}, "Window -4 .* use 4 or 8"),
        ({"window": 10}, r"Window 10 must be a multiple of the cell \(4 tokens\).* use 8 or 12"),
        ({"window": 24}, "Window 24 is larger .* 18 x 10 tokens: use at most 20, or null"),
        ({"halo": 3}, "Halo 3 .* use 0 or 4"),
        ({"halo": -4}, "Halo -4"),
        ({"shift": 2}, "Shift 2"),
        ({"shift": 8}, "Shift 8 must be below 8"),
        ({"window": None, "shift": 4}, "Shift 4 must be 0"),
        ({"scope": "local"}, "'local'.*aligned, global"),
        ({"order": "zigzag"}, "'zigzag'.*hilbert, raster, window"),
        ({"text": -1}, "-1"),
    ],
)
def test_bad_values_are_refused_by_name(change, message):
    good = Layout(3, Grid(18, 10, 4), Grid(5, 3, 4), window=8)
    with pytest.raises(UserError, match=message):
        dataclasses.replace(good, **change)
