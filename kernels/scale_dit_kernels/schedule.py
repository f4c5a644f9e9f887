"""What the kernels are told: which tiles to visit, how to mask the partial ones, and how long lists are split.

Everything here is a tensor of int32 on the device. Streams are numbered: 0 text, 1 image, 2 guidance. A tile is a
stream and the place of its first token; an entry of a list packs both as `start * 4 + stream`.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

TEXT, IMAGE, GUIDANCE = range(3)
SKIPPED, FULL, PARTIAL = range(3)
NOTHING = (1 << 28) * 4 + IMAGE
"""A tile behind the end of every picture: fetched as zeros, and masked."""
FIXED_STEPS = 1
"""What an item costs beside its steps, in steps."""


class Lists(NamedTuple):
    """Which tiles go with which: rows of query tiles with their key tiles, or columns of key tiles with their queries.

    An item is one program's work: `(entry, begin, end of the full tiles, end, slot)`. Items with a slot hold only part
    of a tile's list and leave a partial result there, to be merged in the order of the slots.
    """

    items: Tensor
    """`[items, 5]`, longest first."""
    entries: Tensor
    """`[entries]`: each item's full tiles, then its partial ones."""
    merges: Tensor
    """`[split tiles, 3]`: `(entry, first slot, slots)`."""
    slots: int


class Work(NamedTuple):
    """Lists for a kernel whose programs stay: two tiles of 64 at a time, and a list of items for every program."""

    order: Tensor
    """`[items x batch x heads]`: `item * batch * heads + batch * heads + head`, program by program."""
    starts: Tensor
    """`[programs + 1]`: where each program's part of `order` begins."""
    items: Tensor
    """Of rows: as of `Lists`, counted in pairs of key tiles. Of columns: `(one tile, other tile, begin, end of what is
    read wholly of both, end, slot of the one, slot of the other)`."""
    pairs: Tensor
    """Of rows: `[pairs, 2]` entries, wholly allowed ones first; `NOTHING` fills up a pair. Of columns: `[entries, 2]`,
    a tile of queries and how it reads the one tile (`SKIPPED`, `FULL`, `PARTIAL`) plus 4 times how it reads the other.
    """
    merges: Tensor
    """As of `Lists`, of single tiles."""
    slots: int


@dataclass(frozen=True, eq=False)
class Schedule:
    """All that depends on the layout and not on the tensors' values.

    Args:
        block_m, block_n: Query tokens and key tokens of a tile.
        tokens: Text, image and guidance tokens.
        lists: Which query tiles visit which key tiles.
        longest: Entries beyond which a list is split.
        reads: `[8, N]`: what each image token reads, as first and last + 1 row and column, first of the picture, then
            of the draft.
        image_places, guidance_places: `[N]`, `[L]`: row and column of each token, `row * 65536 + column`.
    """

    block_m: int
    block_n: int
    tokens: tuple[int, int, int]
    lists: TileLists
    longest: int
    reads: Tensor
    image_places: Tensor
    guidance_places: Tensor
    _works: dict[tuple[str, int, int], Work] = field(default_factory=dict)

    @cached_property
    def rows(self) -> Lists:
        """Query tiles, each with the key tiles that it visits."""
        return lay_out(self.lists, self.longest, self.reads.device)

    @cached_property
    def columns(self) -> Lists:
        """Key tiles, each with the query tiles that visit it: the backward pass of keys and values."""
        owner, other, is_full = self.lists
        return lay_out(TileLists(other, owner, is_full), self.longest, self.reads.device)

    def row_work(self, batch_heads: int, programs: int) -> Work:
        """The rows as lists for `programs` programs; kept."""
        key = "rows", batch_heads, programs
        if key not in self._works:
            self._works[key] = share_out_rows(self.rows, batch_heads, programs)
        return self._works[key]

    def column_work(self, batch_heads: int, programs: int) -> Work:
        """The columns, in pairs of key tiles, as lists for `programs` programs; kept."""
        key = "columns", batch_heads, programs
        if key not in self._works:
            self._works[key] = share_out_columns(
                self.lists, self.block_n, self.longest, batch_heads, programs, self.reads.device
            )
        return self._works[key]


class TileLists(NamedTuple):
    """Lists before they are laid out: entry `i` says that tile `owner[i]` goes with tile `other[i]` of a stream."""

    owner: Tensor
    """`[E]`, packed tiles, in any order."""
    other: Tensor
    """`[E]`, packed tiles."""
    is_full: Tensor
    """`[E]`, whether the pair needs no mask."""


def packed(stream: int, start: Tensor) -> Tensor:
    """Tiles as the kernels read them."""
    return start * 4 + stream


def sorted_by(*keys: Tensor) -> Tensor:
    """Places in ascending order of the first key, then of the second, and so on; ties keep their order."""
    order = torch.arange(len(keys[0]))
    for values in reversed(keys):
        order = order[values[order].to(torch.int64).argsort(stable=True)]
    return order


def lay_out(lists: TileLists, longest: int, device: torch.device) -> Lists:
    """Lay lists out for a kernel, splitting those with more than `longest` entries."""
    order = sorted_by(lists.owner, ~lists.is_full)
    owners, counts = lists.owner[order].unique_consecutive(return_counts=True)
    full = torch.zeros_like(counts).index_add_(
        0, torch.arange(len(owners)).repeat_interleave(counts), lists.is_full[order].to(counts.dtype)
    )
    begins = counts.cumsum(0) - counts
    items, merges, slots = [], [], 0
    for owner, begin, count, fulls in zip(*(part.tolist() for part in (owners, begins, counts, full)), strict=True):
        parts = -(-count // longest)
        borders = [begin + count * part // parts for part in range(parts + 1)]
        for first, last in pairwise(borders):
            full_end = min(max(begin + fulls, first), last)
            items.append((owner, first, full_end, last, slots if parts > 1 else -1))
            slots += parts > 1
        if parts > 1:
            merges.append((owner, slots - parts, parts))
    items.sort(key=lambda item: item[1] - item[3])

    def table(rows: Sequence[tuple[int, ...]], width: int) -> Tensor:
        return torch.tensor(rows, dtype=torch.int32).view(-1, width).to(device)

    return Lists(table(items, 5), lists.other[order].to(device, torch.int32), table(merges, 3), slots)


def share_out_rows(rows: Lists, batch_heads: int, programs: int) -> Work:
    """Pair the key tiles of every item, and give the items to programs."""
    entries = rows.entries.cpu().long()
    items = rows.items.cpu().long()
    ends = entries[torch.stack([items[:, 1], items[:, 3] - 1])] if len(entries) else items.new_zeros(2, len(items))
    order = sorted_by(items[:, 1] - items[:, 3], *ends, items[:, 0])
    items, ends = items[order], ends[:, order]
    begin, full_end, end = items[:, 1], items[:, 2], items[:, 3]
    count = (end - begin + 1) // 2
    first = count.cumsum(0) - count
    pairs = torch.full((int(count.sum()) * 2,), NOTHING)
    lengths = end - begin
    within = torch.arange(int(lengths.sum())) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    pairs[2 * first.repeat_interleave(lengths) + within] = entries[begin.repeat_interleave(lengths) + within]
    paired = torch.stack([items[:, 0], first, first + (full_end - begin) // 2, first + count, items[:, 4]], dim=1)
    shares = distribute(count, torch.stack([count, *ends]), batch_heads, programs)
    order, starts, paired, pairs = (
        part.to(rows.items.device, torch.int32) for part in (*shares, paired, pairs.view(-1, 2))
    )
    return Work(order, starts, paired, pairs, rows.merges, rows.slots)


def share_out_columns(
    lists: TileLists, block: int, longest: int, batch_heads: int, programs: int, device: torch.device
) -> Work:
    """Pair neighbouring tiles of `block` keys, with all query tiles that read either, and give them to programs."""
    tiles, tile = lists.other.unique(return_inverse=True)
    place = tiles // 4 // block
    couple_of_tile = torch.stack([tiles % 4, place // 2], dim=1).unique(dim=0, return_inverse=True)[1]
    couples = torch.full((int(couple_of_tile.max()) + 1, 2), NOTHING)
    couples[couple_of_tile, place % 2] = tiles

    queries, query = lists.owner.unique(return_inverse=True)
    entries, entry = (couple_of_tile[tile] * len(queries) + query).unique(return_inverse=True)
    states = torch.zeros(len(entries), 2, dtype=torch.long)
    states[entry, place[tile] % 2] = torch.where(lists.is_full, FULL, PARTIAL)
    couple, is_full = entries // len(queries), (states == FULL).all(1)
    order = sorted_by(couple, ~is_full)
    flags = states[:, 0] + 4 * states[:, 1]
    pairs = torch.stack([queries[entries % len(queries)], flags], dim=1)[order]

    counts = couple.bincount()
    fulls = couple[is_full].bincount(minlength=len(counts))
    begins = counts.cumsum(0) - counts
    items, merges, slots = [], [], 0
    for both, begin, count, full in zip(*(part.tolist() for part in (couples, begins, counts, fulls)), strict=True):
        parts = -(-count // longest)
        borders = [begin + count * part // parts for part in range(parts + 1)]
        for part, (first, last) in enumerate(pairwise(borders)):
            own = (slots + part, slots + parts + part) if parts > 1 else (-1, -1)
            items.append((*both, first, min(max(begin + full, first), last), last, *own))
        if parts > 1:
            merges += [(each, slots + side * parts, parts) for side, each in enumerate(both) if each != NOTHING]
            slots += 2 * parts
    table = torch.tensor(items, dtype=torch.long).view(-1, 7)
    count = table[:, 4] - table[:, 2]
    order = sorted_by(-count, table[:, 2])
    table, count = table[order], count[order]
    ends = pairs[torch.stack([table[:, 2], table[:, 4] - 1]), 0]
    shares = distribute(count, torch.stack([count, *ends]), batch_heads, programs)
    merged = torch.tensor(merges, dtype=torch.long).view(-1, 3)
    order, starts, table, pairs, merged = (part.to(device, torch.int32) for part in (*shares, table, pairs, merged))
    return Work(order, starts, table, pairs, merged, slots)


def distribute(count: Tensor, alike: Tensor, batch_heads: int, programs: int) -> tuple[Tensor, Tensor]:
    """Give items to whichever program has least to do.

    Items that read the same tiles follow each other, so that memory gives them once and then the cache.

    Args:
        count: `[items]`, steps of each, falling.
        alike: `[n, items]`; neighbours with equal columns read the same tiles.

    Returns:
        `Work.order` and `Work.starts`.
    """
    _, sizes = alike.unique_consecutive(dim=1, return_counts=True)
    loads = [(0, program) for program in range(programs)]
    shares: list[list[int]] = [[] for _ in range(programs)]
    first = 0
    for size in sizes.tolist():
        steps = int(count[first]) + FIXED_STEPS
        for batch_head in range(batch_heads):
            for item in range(first, first + size):
                load, program = heapq.heappop(loads)
                shares[program].append(item * batch_heads + batch_head)
                heapq.heappush(loads, (load + steps, program))
        first += size
    numbers = torch.tensor([number for share in shares for number in share], dtype=torch.long)
    return numbers, torch.tensor([0, *(len(share) for share in shares)]).cumsum(0)
