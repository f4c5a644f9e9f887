"""Fine texture at every scale: integer-hashed value noise, summed over the octaves that the picture can show.

Lattices are aligned with the picture, so an octave is one small lattice of hashes, stretched along x and then along y:
the cost of a pixel is two row look-ups, whatever the hash costs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def hash_unit(*keys: Tensor) -> Tensor:
    """Uniform numbers in [-1, 1) from broadcastable int32 keys, the same on every device."""
    state = torch.zeros((), dtype=torch.int32, device=keys[0].device)
    for key in keys:
        state = (state ^ key) * 0x2545F491
        state = (state ^ ((state >> 15) & 0x1FFFF)) * 0x2C1B3C6D
        state = state ^ ((state >> 13) & 0x7FFFF)
    return (state & 0xFFFFFF).float() * (2.0 / 0x1000000) - 1.0


def octave_count(height: int, width: int) -> int:
    """Octaves of `fractal_noise` whose lattice spacing can exceed one pixel, for any camera."""
    return max(1, math.ceil(math.log2(min(height, width)) + 0.5))


def fractal_noise(
    view: Tensor, amplitude: Tensor, gain: Tensor, stretch: Tensor, seed: Tensor, height: int, width: int
) -> Tensor:
    """Sum of value-noise octaves, from one as large as the frame down to one pixel.

    Octaves belong to the world (spacing ``2^-(k + 1/2)``), so a closer camera shows finer ones. An octave fades in
    where its spacing falls below the frame's shorter side, and is gone where its shortest wave, two spacings, falls to
    two pixels: detail appears only where there are pixels to show it.

    Args:
        view: ``[B, 4]`` left, top, width and height of the visible rectangle in world units.
        amplitude: ``[B]`` amplitude of an octave as large as the frame.
        gain: ``[B]`` factor on the amplitude per octave.
        stretch: ``[B, 2]`` lattice spacing along x and y over the octave's own, at least 1.
        seed: ``[B]`` int32.
        height: Rows of the picture.
        width: Columns of the picture.

    Returns:
        ``[B, height, width]`` float32.
    """
    side = view[:, 2:].amin(1)
    pixel = side / min(height, width)
    first = torch.floor(-torch.log2(side))
    total = torch.zeros(view.shape[0], height, width, device=view.device)
    for j in range(octave_count(height, width)):
        spacing = torch.exp2(-(first + j + 0.5))
        frames = torch.log2(side / spacing)
        fade = frames.clamp(0, 1) * (2 * torch.log2(spacing / pixel)).clamp(0, 1)
        weight = amplitude * gain**frames * fade
        octave = seed + (first + j).to(torch.int32) * 0x3C6EF35F
        total = total + _value_noise(view, spacing, stretch, octave, weight, j, height, width)
    return total


def _value_noise(
    view: Tensor, spacing: Tensor, stretch: Tensor, seed: Tensor, weight: Tensor, j: int, height: int, width: int
) -> Tensor:
    batch = view.shape[0]
    # Cells beyond one a pixel belong to an octave that has faded out: no need to hash them.
    longest = max(height, width)
    cells = min(int(2 ** (j + 0.5) * longest / min(height, width)), longest) + 3
    steps = torch.arange(cells, dtype=torch.int32, device=view.device)
    column, x, x_origin = _lattice_axis(view[:, 0], view[:, 2], spacing * stretch[:, 0], width, cells)
    row, y, y_origin = _lattice_axis(view[:, 1], view[:, 3], spacing * stretch[:, 1], height, cells)
    lattice = hash_unit(
        (x_origin[:, None] + steps)[:, None, :], (y_origin[:, None] + steps)[:, :, None], seed[:, None, None]
    )
    lattice = lattice * weight[:, None, None]
    column = column[:, None, :].expand(batch, cells, width)
    left = lattice.gather(2, column)
    across = torch.lerp(left, lattice.gather(2, column + 1), x[:, None, :]).view(batch * cells, width)
    row = (row + torch.arange(batch, device=view.device)[:, None] * cells).flatten()
    above = across.index_select(0, row).view(batch, height, width)
    below = across.index_select(0, row + 1).view(batch, height, width)
    return torch.lerp(above, below, y[:, :, None])


def _lattice_axis(
    start: Tensor, length: Tensor, spacing: Tensor, pixels: int, cells: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Lattice cell ``[B, pixels]`` (int64, counted from the first visible one), smooth fraction in it, first cell."""
    begin = start / spacing
    origin = torch.floor(begin)
    centres = torch.arange(pixels, device=start.device) + 0.5
    at = (begin - origin)[:, None] + centres * (length / spacing / pixels)[:, None]
    cell = torch.floor(at)
    fraction = at - cell
    return cell.long().clamp(max=cells - 2), fraction * fraction * (3 - 2 * fraction), origin.to(torch.int32)
