"""What `flex` and `fa4` share: streams joined and padded, lists of tiles; and the geometry that `fa4` is told."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_attention import LAYOUTS, output_and_gradients, random_inputs

from scale_dit.attention import attend, fa4, flex
from scale_dit.attention._joined import join_streams, lists_of, needs_no_mask
from scale_dit.errors import UserError
from scale_dit.grid import Grid
from scale_dit.layout import Layout

WHOLE = Layout(128, Grid(32, 32, 8), Grid(16, 16, 8), window=16, halo=8)
"""Of tiles of 128 x 64 that need no mask; those of 128 x 128 do."""
IN_CELLS = dataclasses.replace(WHOLE, text=64, guidance=Grid(8, 24, 8))


def test_streams_are_joined_with_their_padding():
    layout = LAYOUTS["ragged"]
    text, image, guidance = random_inputs(layout)
    joined = join_streams(text, image, guidance)
    assert joined.query.shape[1] == 384
    assert joined.key.shape[1] == 128 + 384 + 128
    torch.testing.assert_close(joined.value[:, 128 : 128 + layout.image.tokens], image[2])
    assert joined.value[:, 128 + layout.image.tokens : 512].eq(0).all()
    torch.testing.assert_close(joined.text_key, torch.cat([text[1], image[1]], dim=1))


def test_nothing_is_copied_twice_where_nothing_is_padded():
    text, image, guidance = random_inputs(WHOLE)
    joined = join_streams(text, image, guidance)
    assert joined.text_key.data_ptr() == joined.key.data_ptr()
    assert joined.query.data_ptr() == image[0].data_ptr()


def test_lists_hold_what_each_owner_visits():
    owner, other = torch.tensor([0, 0, 2, 2, 2]), torch.tensor([4, 1, 0, 3, 5])
    counts, members = lists_of(owner, other, owners=4)
    assert counts.tolist() == [[[2, 0, 3, 0]]]
    assert members[0, 0, 0, :2].tolist() == [4, 1]
    assert members[0, 0, 2].tolist() == [0, 3, 5]
    assert lists_of(owner, other, 4, width=6)[1].shape == (1, 1, 4, 6)


def test_what_needs_no_mask_is_known():
    assert needs_no_mask(WHOLE)
    assert not needs_no_mask(dataclasses.replace(WHOLE, order="raster"))
    assert not needs_no_mask(dataclasses.replace(WHOLE, text=64))  # would be padded
    assert not needs_no_mask(LAYOUTS["square"])


@pytest.mark.slow
def test_flex_is_right_after_it_failed():
    """A compilation that failed must not leave the unfused formula behind, which reads every tile."""
    inputs = random_inputs(WHOLE, torch.float32)
    joined = join_streams(*inputs)
    with pytest.raises(Exception, match="backward on CPU"):
        flex.attend_to(joined._replace(query=joined.query.detach().requires_grad_()), WHOLE, scale=0.2, side=64)
    with torch.no_grad():
        _, actual = flex.attend_to(join_streams(*inputs), WHOLE, scale=0.2, side=64)
        _, wanted = attend(*inputs, WHOLE, "reference", scale=0.2)
    torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("side", [64, 128])
@torch.no_grad()
def test_flex_without_masks_equals_the_reference(side):
    inputs = random_inputs(WHOLE, torch.float32)
    actual = flex.attend_to(join_streams(*inputs), WHOLE, scale=0.2, side=side)
    for part, wanted in zip(actual, attend(*inputs, WHOLE, "reference", scale=0.2), strict=True):
        torch.testing.assert_close(part, wanted, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(("shape", "gradients"), [((1, 2**20, 24, 128), False), ((1, 2**18, 24, 128), True)])
def test_flex_refuses_what_its_kernels_cannot_address(shape, gradients):
    layout = Layout(0, Grid(shape[1] // 1024, 1024, 8), None, window=16)
    image = torch.empty(shape, device="meta", dtype=torch.bfloat16, requires_grad=gradients)
    with pytest.raises(UserError, match=r"'flex' is wrong for tensors of more than .* elements.*use 'triton'"):
        flex.run(image, image, image, layout.block_mask("meta"), scale=1.0)


@pytest.mark.parametrize("layout", [WHOLE, IN_CELLS, dataclasses.replace(WHOLE, order="hilbert", shift=8)])
def test_the_table_of_cells_is_the_mask(layout):
    table = fa4.cell_table(layout)
    mask = table.repeat_interleave(64, 0).repeat_interleave(64, 1).bool()
    pieces = mask.split([-(-tokens // 128) * 128 for tokens in (layout.text, 1024, layout.guidance_tokens)], dim=1)
    tokens = (layout.text, 1024, layout.guidance_tokens)
    unpadded = [piece[:, :count] for piece, count in zip(pieces, tokens, strict=True)]
    assert torch.equal(torch.cat(unpadded, dim=1), layout.dense_mask()[layout.text :])
    assert not any(piece[:, count:].any() for piece, count in zip(pieces, tokens, strict=True))


def test_fa4_refuses_what_is_not_made_of_cells():
    with pytest.raises(UserError, match=r"'fa4' takes layouts made of whole tiles.*raster order.*use 'triton'"):
        fa4.cell_table(dataclasses.replace(WHOLE, order="raster"))


def test_fa4_refuses_heads_that_its_kernels_do_not_take():
    with pytest.raises(UserError, match="multiples of 8 up to 128, but these have 12"):
        fa4.attend(*random_inputs(WHOLE, torch.bfloat16, head_dim=12), WHOLE, 1.0)


@pytest.mark.skipif(fa4._is_installed(), reason="says how to install what is missing")
def test_fa4_says_how_to_install_it():
    with pytest.raises(UserError, match=r"'fa4' cannot run here: .*pip install 'scale-dit\[fa4\]'"):
        attend(*random_inputs(WHOLE, torch.bfloat16), WHOLE, "fa4")


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [WHOLE, IN_CELLS, dataclasses.replace(WHOLE, halo=0)])
@pytest.mark.parametrize("backend", ["fa4", "flex"])
def test_whole_tiles_on_a_gpu_equal_the_reference(backend, layout):
    if backend == "fa4" and fa4.unavailable(torch.device("cuda"), torch.bfloat16):
        pytest.skip("needs flash-attn-4 and a GPU that it has kernels for")
    inputs = random_inputs(layout, torch.bfloat16, head_dim=64, device="cuda")
    expected = output_and_gradients(inputs, layout, "reference")
    for actual, wanted in zip(output_and_gradients(inputs, layout, backend), expected, strict=True):
        assert (actual - wanted).norm() <= 1e-2 * wanted.norm()
