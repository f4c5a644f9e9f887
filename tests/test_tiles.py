"""Tile lists and block masks against the dense mask."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from layout_strategies import layouts
from torch.nn import functional

from scale_dit.grid import Grid, guidance_grid
from scale_dit.layout import Layout


def image_rows_padded(layout: Layout, block_m: int, block_n: int) -> torch.Tensor:
    """The dense mask's image rows with every stream padded to whole tiles, `[query tiles * m, key tiles * n]`."""

    def pad(part: torch.Tensor, block: int) -> torch.Tensor:
        return functional.pad(part, (0, -part.shape[-1] % block))

    mask = layout.dense_mask()[layout.text :]
    streams = mask.split([layout.text, layout.image.tokens, layout.guidance_tokens], dim=1)
    columns = torch.cat([pad(stream, block_n) for stream in streams], dim=1)
    return pad(columns.T, block_m).T


@settings(deadline=None, max_examples=60)
@given(layouts(), st.sampled_from([1, 4, 5, 16]), st.sampled_from([1, 4, 7]))
def test_tiles_are_those_of_the_dense_mask(layout, block_m, block_n):
    tiles = layout.tiles(block_m, block_n)
    rows = image_rows_padded(layout, block_m, block_n)
    pairs = rows.view(len(rows) // block_m, block_m, -1, block_n).sum((1, 3))
    queries = torch.full((len(pairs), 1), block_m)
    queries[-1] -= -layout.image.tokens % block_m
    assert torch.equal(tiles.visited, pairs > 0)
    assert torch.equal(tiles.full, pairs == queries * block_n)
    assert torch.equal(tiles.partial, (pairs > 0) & (pairs < queries * block_n))
    assert sum(tiles.streams) == pairs.shape[1]


# A draft with columns that no window reads: they must keep places of their own.
@example(Layout(0, Grid(1, 1, 1), Grid(1, 4, 1)))
@settings(deadline=None, max_examples=40)
@given(layouts())
def test_the_block_mask_is_the_dense_mask(layout):
    block_mask = layout.block_mask()
    expected = image_rows_padded(layout, 128, 128)
    assert block_mask.shape[-2:] == expected.shape
    tokens = torch.arange(layout.image.tokens)
    columns = torch.arange(expected.shape[1])
    actual = block_mask.mask_mod(0, 0, tokens[:, None], columns[None, :])
    assert torch.equal(actual, expected[: layout.image.tokens])
    assert torch.equal(block_mask.to_dense()[0, 0].bool(), layout.tiles(128, 128).visited)


@pytest.mark.parametrize("halo", [0, 8])
def test_regular_windows_are_made_of_full_tiles(halo):
    """The layout's purpose: with cells of 64 tokens, tiles of one cell are never partial, for any union of cells."""
    grid = Grid(64, 48, 8)
    layout = Layout(128, grid, guidance_grid(grid, 4), window=16, halo=halo)
    tiles = layout.tiles(64, 64)
    assert not tiles.partial.any()
    assert tiles.full.sum() * 64 * 64 == sum(layout.attention_pairs()[1:])


def test_8k_is_tiled_in_seconds():
    grid = Grid(512, 512, 8)
    layout = Layout(512, grid, guidance_grid(grid, 4), window=16, halo=8)
    start = time.perf_counter()
    tiles = layout.tiles(128, 64)
    assert time.perf_counter() - start < 20
    assert tiles.visited.shape == (2048, 8 + 4096 + 256)
    assert not tiles.partial.any()
