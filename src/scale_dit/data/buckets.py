"""Aspect buckets: picture sizes of about equal area, and batches that never mix two of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch.utils.data import Sampler

from scale_dit.errors import UserError

Size = tuple[int, int]


def bucket_sizes(side: int, token: int = 16, max_aspect: float = 2.0) -> tuple[Size, ...]:
    """Sizes whose area is as near to `side ** 2` as whole tokens allow, from portrait to landscape.

    Args:
        side: pixels a side of the square bucket, a multiple of `token`.
        token: pixels a side that one token covers.
        max_aspect: longest side over shortest side, at least 1.

    Returns:
        (height, width) in pixels, tallest first; always holds (side, side).

    Raises:
        UserError: for a side that is no multiple of the token size, or an aspect below 1.

    Example:
        >>> bucket_sizes(64, token=16, max_aspect=2)
        ((80, 48), (64, 64), (48, 80))
    """
    check_size((side, side), token)
    if max_aspect < 1:
        raise UserError(f"max_aspect={max_aspect} must be at least 1 (long side over short side; 1 keeps squares only)")
    tokens = side // token
    sizes = {(side, side)}
    for rows in range(1, tokens):
        columns = round(tokens * tokens / rows)
        if columns <= rows * max_aspect:
            sizes |= {(rows * token, columns * token), (columns * token, rows * token)}
    return tuple(sorted(sizes, reverse=True))


def check_size(size: Size, token: int) -> None:
    """Raise `UserError` unless both sides are positive multiples of the token size."""
    for name, side in zip(("height", "width"), size, strict=True):
        if side <= 0 or side % token:
            near = max(token, round(side / token) * token)
            raise UserError(f"{name} {side} px is not a positive multiple of the token size {token} px; use {near}")


def nearest_bucket(height: int, width: int, sizes: Sequence[Size]) -> int:
    """Index of the bucket whose aspect ratio is nearest to the picture's, as a ratio of ratios."""
    aspect = math.log(width / height)
    distances = [abs(math.log(bucket[1] / bucket[0]) - aspect) for bucket in sizes]
    return distances.index(min(distances))


class Bucketed(Protocol):
    """A map-style dataset that knows the bucket of each item without loading it."""

    @property
    def bucket_of(self) -> Sequence[int]:
        """Bucket of each item."""
        ...


class BucketBatchSampler(Sampler[list[int]]):
    """Batches of indices, each from one bucket, the same for the same seed and epoch on any machine.

    Every rank computes the same list and takes each `ranks`-th batch, so no picture is given twice in an epoch.
    Batches that would give some ranks one more than others are left out (fewer than `ranks` of them), and so are a
    bucket's last pictures that do not fill a batch, unless `drop_last=False`.

    Lightning finds `set_epoch` through `sampler` and calls it before each epoch; the epoch is handed on to the dataset.

    Args:
        dataset: with `bucket_of`, one bucket index an item; `set_epoch` of the dataset is called where there is one.
        batch_size: items in a batch.
        shuffle: new order of items and batches every epoch; otherwise bucket by bucket, ascending.
        seed: of the shuffling.
        drop_last: leave incomplete batches out.
        rank, ranks: of this process, and how many processes share the work.

    Raises:
        UserError: for sizes below 1, a rank that is not there, or if not one whole batch can be made for each rank.
    """

    def __init__(
        self,
        dataset: Bucketed,
        batch_size: int,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = True,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size} must be at least 1")
        if ranks < 1 or not 0 <= rank < ranks:
            raise UserError(f"rank={rank} must be from 0 to ranks-1, with ranks={ranks} at least 1")
        self.dataset = dataset
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.rank = rank
        self.ranks = ranks
        self.epoch = 0
        self._skip = 0
        if len(self) == 0:
            raise UserError(
                f"{len(dataset.bucket_of)} pictures in {len(set(dataset.bucket_of))} bucket(s) do not fill one batch "
                f"of {batch_size} for each of {ranks} process(es); lower batch_size, use fewer buckets or "
                f"drop_last=False"
            )

    @property
    def sampler(self) -> BucketBatchSampler:
        """This object: where Lightning looks for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, here and in the dataset."""
        self.epoch = epoch
        hand_on: Any = getattr(self.dataset, "set_epoch", None)
        if callable(hand_on):
            hand_on(epoch)

    def skip_next(self, batches: int) -> None:
        """Leave out the first batches of the next pass only: those that a resumed run has already seen."""
        self._skip = batches

    def __len__(self) -> int:
        """Batches that this rank gets in one whole epoch."""
        counts = torch.bincount(torch.as_tensor(list(self.dataset.bucket_of), dtype=torch.int64)).tolist()
        round_up = 0 if self.drop_last else self.batch_size - 1
        return sum((count + round_up) // self.batch_size for count in counts) // self.ranks

    def __iter__(self) -> Iterator[list[int]]:
        batches = self._batches()
        shared = len(batches) // self.ranks * self.ranks
        skip, self._skip = self._skip, 0
        yield from batches[self.rank : shared : self.ranks][skip:]

    def _batches(self) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        buckets = torch.as_tensor(list(self.dataset.bucket_of), dtype=torch.int64)
        batches: list[list[int]] = []
        for bucket in buckets.unique().tolist():
            members = (buckets == bucket).nonzero().flatten()
            if self.shuffle:
                members = members[torch.randperm(len(members), generator=generator)]
            split = [part.tolist() for part in members.split(self.batch_size)]
            if self.drop_last and len(split[-1]) < self.batch_size:
                split.pop()
            batches += split
        if self.shuffle:
            batches = [batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()]
        return batches
