"""What data modules share that read a latent cache: the order of batches, and going on behind those that were used."""

from __future__ import annotations

import itertools
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import lightning
from torch.utils.data import DataLoader, Sampler

from scale_dit.data.buckets import BucketBatchSampler
from scale_dit.data.cache import CachedLatents
from scale_dit.errors import UserError

log = logging.getLogger(__name__)


class CachedPairs(lightning.LightningDataModule, ABC):
    """Pictures and their drafts from a latent cache on disk, for `ScaleDiTModule`.

    A batch is of one size and holds `latents` `[B, C, h, w]`, `guidance_latents` `[B, C, h/s, w/s]`, `text` (`tokens`,
    `pooled`), `caption` and `name`. Which pictures batch k of a rank holds depends on the seed, k, the rank and the
    number of ranks only, so a resumed run goes on exactly behind the batches that it had used. Every picture is used
    once before any comes again; the last batch of a size may be smaller.

    Args:
        batch_size: Pictures a step and device.
        seed: Order of the batches.

    Attributes:
        latents: The cache, which subclasses open.

    Raises:
        UserError: A batch size below 1.
    """

    latents: CachedLatents

    def __init__(self, batch_size: int, seed: int):
        super().__init__()
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}, but it must be at least 1 (data.batch_size)")
        self.batch_size, self.seed = batch_size, seed
        self.first_batch = 0
        self._earlier = 0

    @property
    def sizes(self) -> Sequence[tuple[int, int]]:
        """(height, width) in px of the pictures."""
        return self.latents.sizes

    @property
    @abstractmethod
    def content(self) -> str:
        """Names what is trained on, so that a resumed run sees whether it still is the same."""

    def train_dataloader(self) -> DataLoader:
        """Endless batches of this rank."""
        self._earlier = self._trainer_batches - self.first_batch
        order = BucketBatchSampler(
            self.latents,
            self.batch_size,
            seed=self.seed,
            drop_last=False,
            rank=self.trainer.global_rank,
            ranks=self.trainer.world_size,
        )
        return DataLoader(self.latents, batch_sampler=EndlessBatches(order, self.first_batch))

    def state_dict(self) -> dict[str, Any]:
        """How many batches were used, of which pictures."""
        return {"batches": self._trainer_batches - self._earlier, "photographs": self.content}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on behind the batches that were used, if they were these pictures'."""
        if state_dict["photographs"] == self.content:
            self.first_batch = state_dict["batches"]
        else:
            log.warning(
                "the checkpoint was trained on other pictures or cuts than those of %s: their order begins anew",
                self.latents.cache.folder,
            )

    @property
    def _trainer_batches(self) -> int:
        """Batches that the trainer has used, in earlier parts of a resumed run too."""
        return self.trainer.fit_loop.epoch_loop.total_batch_idx + 1


class EndlessBatches(Sampler[list[int]]):
    """The batches of a rank, epoch after epoch, each epoch in its own order.

    Args:
        order: Gives the batches of one epoch.
        first: Index of the first batch, counted through all epochs.
    """

    def __init__(self, order: BucketBatchSampler, first: int = 0):
        self.order, self.first = order, first

    def __iter__(self) -> Iterator[list[int]]:
        epoch, used = divmod(self.first, len(self.order))
        self.order.skip_next(used)
        for number in itertools.count(epoch):
            self.order.set_epoch(number)
            yield from self.order
