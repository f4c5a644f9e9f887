"""Layers of an autoencoder over planes, band by band: the same numbers as over the whole, but for rounding.

A convolution needs a few rows around a band, a group norm the statistics of everything, an attention layer all keys.
So a norm goes over its input once for the statistics, and they are applied where the next convolution reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from scale_dit.autoencoder.attention import SCORE_BYTES, attend_all
from scale_dit.autoencoder.planes import Bus, Computed, Plane, Source, bands

Apply = Callable[[Tensor], Tensor]
Statistics = dict[str, tuple[Tensor, Tensor]]
"""Mean and variance of the groups of every norm, float64 `[groups]`, by its name."""
Region = tuple[Fraction, Fraction, Fraction, Fraction]


@dataclass
class Streaming:
    """How layers are streamed.

    Args:
        compute: where bands are worked on.
        store: where planes are kept.
        band_elements: elements of a band's widest activation.
        wrap_columns, wrap_rows: what lies beyond an edge is the opposite edge, not zeros.
        regions: first and last + 1 row and column that count for statistics, for each of the batch, as shares of its
            sides; `None`: everything.
        score_bytes, way: of the attention layer, see `attend_all`.
        statistics: what is there is used, what is not there is measured and kept there.
    """

    compute: torch.device
    store: torch.device
    band_elements: int = 2**26
    wrap_columns: bool = False
    wrap_rows: bool = False
    score_bytes: int = SCORE_BYTES
    way: str | None = None
    regions: tuple[Region, ...] | None = None
    statistics: Statistics = field(default_factory=dict)

    @cached_property
    def bus(self) -> Bus | None:
        """Between planes on the host and a card; there is none where both are the same."""
        return Bus(self.compute) if self.compute.type == "cuda" and self.store.type == "cpu" else None

    def plane(self, shape: Sequence[int], dtype: torch.dtype) -> Plane:
        """A new plane `[B, C, H, W]`."""
        return Plane(shape, dtype, self.store, self.compute, self.bus)

    def plane_of(self, values: Tensor) -> Plane:
        """A plane of these values `[B, C, H, W]`."""
        plane = self.plane(values.shape, values.dtype)
        plane.write(0, values)
        return plane

    def norm(self, source: Source, norm: nn.GroupNorm, name: str, activation: Apply | None = None) -> Apply:
        """The group norm of a plane, and what comes behind it, as a function of its bands."""
        if name not in self.statistics:
            self.statistics[name] = self._measure(source, norm.num_groups)
        mean, variance = (each.to(self.compute) for each in self.statistics[name])
        each_group = source.channels // norm.num_groups
        factor = (variance + norm.eps).rsqrt().repeat_interleave(each_group)
        offset = -mean.repeat_interleave(each_group) * factor
        if norm.weight is not None:
            factor, offset = factor * norm.weight, offset * norm.weight + norm.bias
        factor, offset = (each.float()[None, :, None, None] for each in (factor, offset))

        def apply(band: Tensor) -> Tensor:
            normed = (band.float() * factor + offset).to(band.dtype)
            return normed if activation is None else activation(normed)

        return apply

    def _measure(self, source: Source, groups: int) -> tuple[Tensor, Tensor]:
        """Mean and variance of each group, float64 `[groups]`: sums of every band about the first band's mean."""
        count, first = 0, None
        total = squares = torch.zeros(groups, dtype=torch.float64, device=self.compute)
        for start, stop in bands(source.height, source.batch * source.channels * source.width, self.band_elements):
            band = self._measured(source, start, stop, groups)
            if band.shape[1] == 0:
                continue
            if first is None:
                first = band.mean(1, keepdim=True)
            centred = band - first
            total = total + centred.sum(1, dtype=torch.float64)
            squares = squares + centred.square().sum(1, dtype=torch.float64)
            count += band.shape[1]
        assert first is not None
        shift = total / count
        return first[:, 0].double() + shift, (squares / count - shift.square()).clamp_min(0)

    def _measured(self, source: Source, start: int, stop: int, groups: int) -> Tensor:
        """What counts for the statistics in rows `start` to `stop`, float32 `[groups, n]`."""
        band = source.rows(start, stop).float().transpose(0, 1)
        if self.regions is None:
            return band.reshape(groups, -1)
        parts = []
        for index, (top, bottom, left, right) in enumerate(self.regions):
            first, last = (min(max(int(edge * source.height) - start, 0), stop - start) for edge in (top, bottom))
            columns = slice(int(left * source.width), int(right * source.width))
            parts.append(band[:, index, first:last, columns].reshape(groups, -1))
        return torch.cat(parts, dim=1)

    def convolve(
        self,
        source: Source,
        layer: nn.Conv2d,
        before: Apply | None = None,
        after: Callable[[Tensor, int, int], Tensor] | None = None,
        in_place: bool = False,
        ends_only: bool = False,
    ) -> Plane:
        """A convolution of a plane.

        Args:
            before: what is done with the source first.
            after: what is done with a band of the result, given its first and last + 1 row.
            in_place: write the result over the source, which has as many channels.
            ends_only: pad with zeros at the right and at the bottom alone, as downsampling layers do.
        """
        height, width = source.height, source.width
        if ends_only:
            height, width = height // layer.stride[0], width // layer.stride[1]
        if in_place and isinstance(source, Plane) and not self.wrap_rows:  # where the last band reads the first row
            target = source
        else:
            target = self.plane((source.batch, layer.out_channels, height, width), source.dtype)
        kept: tuple[int, Tensor] | None = None
        wide = source.batch * max(layer.in_channels, layer.out_channels) * width
        for start, stop in bands(height, wide, self.band_elements):
            band, first, outside = self._around(source, layer, start, stop, ends_only, kept)
            read = self._padded(band, layer, before, outside, ends_only)
            result = functional.conv2d(read, layer.weight, layer.bias, layer.stride)
            if after is not None:
                result = after(result, start, stop)
            if target is source:  # the next band needs this row as it was
                kept = stop - 1, band[:, :, stop - 1 - first : stop - first].clone()
            target.write(start, result)
        return target

    def convolved(self, source: Source, layer: nn.Conv2d, before: Apply) -> Iterator[tuple[int, Tensor]]:
        """First row and band of a convolution's result, one after the other, kept nowhere."""
        for start, stop in bands(source.height, source.batch * layer.in_channels * source.width, self.band_elements):
            read = self._read(source, layer, start, stop, before)
            yield start, functional.conv2d(read, layer.weight, layer.bias)

    def _read(self, source: Source, layer: nn.Conv2d, start: int, stop: int, before: Apply | None) -> Tensor:
        """What a convolution reads for rows `start` to `stop` of its result, padded."""
        band, _, outside = self._around(source, layer, start, stop)
        return self._padded(band, layer, before, outside)

    def _around(
        self,
        source: Source,
        layer: nn.Conv2d,
        start: int,
        stop: int,
        ends_only: bool = False,
        kept: tuple[int, Tensor] | None = None,
    ) -> tuple[Tensor, int, tuple[int, int]]:
        """Rows that a convolution reads, which is the first one, and how many are missing above and below.

        Args:
            kept: a row that was written over, as it was, and its place.
        """
        around = 0 if ends_only else layer.kernel_size[0] // 2
        first, last = start * layer.stride[0] - around, (stop - 1) * layer.stride[0] - around + layer.kernel_size[0]
        above, below = (0, 0) if self.wrap_rows else (max(0, -first), max(0, last - source.height))
        first, last = first + above, last - below
        if kept is not None and first <= kept[0]:
            band = torch.cat([kept[1], source.rows(kept[0] + 1, last)], dim=2)
        else:
            band = source.rows(first, last)
        return band, first, (above, below)

    def _padded(
        self,
        band: Tensor,
        layer: nn.Conv2d,
        before: Apply | None,
        outside: tuple[int, int],
        ends_only: bool = False,
    ) -> Tensor:
        if before is not None:
            band = before(band)
        around = layer.kernel_size[0] // 2
        sides = (0, 1) if ends_only else (around, around)
        if self.wrap_columns and max(sides):
            band = functional.pad(band, (*sides, 0, 0), mode="circular")
            sides = (0, 0)
        return functional.pad(band, (*sides, *outside))

    def enlarge(self, source: Source, layer: nn.Conv2d) -> Source:
        """Every pixel twice along both axes, then a convolution: computed whenever rows are read, kept nowhere.

        It would be the largest activation of all; three readings cost less than the memory.
        """

        def repeated(start: int, stop: int) -> Tensor:
            band = source.rows(start // 2, -(-stop // 2)).repeat_interleave(2, 2).repeat_interleave(2, 3)
            return band[:, :, start % 2 : start % 2 + stop - start]

        sides = (2 * source.height, 2 * source.width)
        twice = Computed((source.batch, source.channels, *sides), source.dtype, repeated)

        def convolved(start: int, stop: int) -> Tensor:
            return functional.conv2d(self._read(twice, layer, start, stop, None), layer.weight, layer.bias)

        return Computed((source.batch, layer.out_channels, *sides), source.dtype, convolved)

    def residual(self, source: Source, block: Any, name: str) -> Plane:
        """diffusers' `ResnetBlock2D` without a time embedding; the source is not needed any more."""
        hidden = self.convolve(source, block.conv1, self.norm(source, block.norm1, f"{name}.norm1", block.nonlinearity))

        def add(band: Tensor, start: int, stop: int) -> Tensor:
            straight = source.rows(start, stop)
            if block.conv_shortcut is not None:
                straight = block.conv_shortcut(straight)
            return (straight + band) / block.output_scale_factor

        before = self.norm(hidden, block.norm2, f"{name}.norm2", block.nonlinearity)
        return self.convolve(hidden, block.conv2, before, add, in_place=True)

    def attention(self, source: Plane, layer: Any, name: str) -> Plane:
        """diffusers' `Attention` over all pixels, queries in bands; keys and values are where it is computed."""
        normed = self.norm(source, layer.group_norm, f"{name}.group_norm")
        row, tokens = source.channels * source.width, source.height * source.width
        projections = layer.to_q, layer.to_k, layer.to_v
        parts = [
            torch.empty(source.batch, tokens, each.out_features, dtype=source.dtype, device=self.compute)
            for each in projections
        ]
        for start, stop in bands(source.height, row, self.band_elements):
            read = normed(source.rows(start, stop)).flatten(2).transpose(1, 2)
            for part, projection in zip(parts, projections, strict=True):
                part[:, start * source.width : stop * source.width] = projection(read)
        query, key, value = (part.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for part in parts)
        for start, stop in bands(source.height, row, self.band_elements // 4):
            mine = query[:, :, start * source.width : stop * source.width]
            band = attend_all(mine, key, value, self.score_bytes, self.way)
            band = layer.to_out[0](band.transpose(1, 2).flatten(2)).transpose(1, 2)
            straight = source.rows(start, stop)
            if layer.residual_connection:
                band = band.unflatten(2, straight.shape[2:]) + straight
            source.write(start, band / layer.rescale_output_factor)
        return source
