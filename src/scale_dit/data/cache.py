"""Latents and text embeddings, computed once and kept on disk.

For each picture the cache keeps the latents of the picture and of its reductions by each scale (the guidance), its
caption and name; each different caption's embeddings once; and those of the empty caption, for caption dropout.
Latents are the mean of the autoencoder's posterior, not a sample.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from scale_dit.data.cache_store import LatentCache, Record, as_stored, caption_key, guidance_name, weights_fingerprint
from scale_dit.data.encoding import EncodeImage, EncodeText, encode_batch, encode_pictures, text_tensors
from scale_dit.data.photos import BrokenPhoto
from scale_dit.data.sources import Skipped
from scale_dit.errors import UserError

__all__ = ["CachedLatents", "LatentCache", "build_cache", "cache_fingerprint", "encode_batch", "weights_fingerprint"]

log = logging.getLogger(__name__)

MOST_OPEN = 512
"""Files that are mapped at a time; operating systems allow a process some thousands."""


def cache_fingerprint(
    base: str,
    dataset: Any,
    scales: Sequence[float] = (4.0,),
    token: int = 16,
    max_tokens: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    draws: int = 1,
) -> dict[str, Any]:
    """Everything that decides what a cache holds.

    Args:
        base: names the weights, such as `weights_fingerprint(folder)`.
        dataset: with `description()`: plain values that decide its items.
        scales, token, max_tokens, dtype, draws: as in `build_cache`.
    """
    return {
        "base": base,
        "data": dataset.description(),
        "scales": [float(scale) for scale in scales],
        "token": token,
        "max_tokens": max_tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "draws": draws,
    }


def build_cache(
    dataset: Any,
    encode_image: EncodeImage,
    encode_text: EncodeText,
    folder: str | Path,
    base: str,
    scales: Sequence[float] = (4.0,),
    token: int = 16,
    max_tokens: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    draws: int = 1,
    batch_size: int = 8,
    workers: int = 0,
    records_per_shard: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> LatentCache:
    """Encode what is not there yet; after an interruption, go on with the first shard that is missing or damaged.

    One process at a time: with several ranks, the first builds and the others wait.

    Args:
        dataset: map-style, of `{"image": [3, H, W] in [0, 1], "caption": str, "name": str}` or `BrokenPhoto`, with
            `description()`; with `set_epoch` too if `draws` is above 1.
        encode_image: pictures `[B, 3, H, W]` in [0, 1] -> latents `[B, C, h, w]`, the posterior's mean.
        encode_text: captions -> mapping or dataclass of tensors `[B, ...]`.
        folder: of the cache.
        base: names the weights behind the two encoders.
        scales: of the guidance; one reduction each.
        token: pixels a side that one token covers.
        max_tokens: reduce the guidance further until it has no more tokens than that.
        dtype: in which floating-point tensors are kept.
        draws: cuts of each picture; the n-th is that of epoch n.
        batch_size: pictures and captions that are encoded at a time.
        workers: processes that read pictures.
        records_per_shard: pictures in a file.
        progress: called with the pictures done and all of them, after each shard.

    Returns:
        The finished cache.

    Raises:
        UserError: the folder holds another cache, the disk is full, or no picture could be read.
    """
    if draws < 1 or (draws > 1 and not hasattr(dataset, "set_epoch")):
        raise UserError(f"draws={draws} must be at least 1, and exactly 1 for a dataset without set_epoch")
    fingerprint = cache_fingerprint(base, dataset, scales, token, max_tokens, dtype, draws)
    cache = LatentCache(folder, fingerprint, records_per_shard)
    total = len(dataset) * draws
    shards = -(-total // cache.records_per_shard)
    cache.shards = shards
    done = dict(cache.headers())
    if cache.finished and len(done) == shards:
        return cache
    cache.remove_partial_files()
    cache.write_index(shards, finished=False)
    stored = {caption for header in done.values() for caption in header["captions"]}
    wanting = [shard for shard in range(shards) if shard not in done]
    if done and wanting:
        log.info("%s: %d of %d shards are there, going on", cache.folder, len(done), shards)
    for count, shard in enumerate(wanting, start=1):
        first = shard * cache.records_per_shard
        places = range(first, min(first + cache.records_per_shard, total))
        items, skipped = _read_items(dataset, places, workers)
        pictures = _encode_items(items, encode_image, scales, token, max_tokens, dtype, batch_size)
        captions = sorted({"", *(item["caption"] for item in items)} - stored)
        texts = _encode_captions(captions, encode_text, dtype, batch_size)
        records = [
            Record(shard, row, item["name"], item["caption"], *item["image"].shape[1:])
            for row, item in enumerate(items)
        ]
        cache.write_shard(shard, pictures, records, texts, skipped)
        stored |= set(captions)
        if count == 1:
            _warn_if_tight(cache, shard, len(wanting))
        if progress is not None:
            progress(min((len(done) + count) * cache.records_per_shard, total), total)
    cache.write_index(shards, finished=True)
    return cache


class CachedLatents(Dataset[dict[str, Any]]):
    """A finished cache as a dataset; files are mapped into memory when first needed, in each process.

    `dataset[i]` is `{"latents": [C, h, w], "guidance_latents": [C, h', w'], "text": {name: tensor}, "caption": str,
    "name": str}`: latents in float32, text as it was kept. torch's own collate function makes batches of it.

    Args:
        folder: of the cache.
        scale: of the guidance; default: the only one that the cache has.
        fingerprint: from `cache_fingerprint`, to be sure that it is the right cache.

    Attributes:
        bucket_of: index into `sizes` of each picture, for `BucketBatchSampler`.
        sizes: (height, width) in pixels that occur.
        skipped: pictures that could not be read when the cache was built.

    Raises:
        UserError: no cache, another one, an unfinished or damaged one, or a scale that it does not have.
    """

    def __init__(
        self, folder: str | Path, scale: float | None = None, fingerprint: Mapping[str, Any] | None = None
    ) -> None:
        self.cache = LatentCache(folder, fingerprint)
        self.scale = self._choose_scale(scale)
        headers = dict(self.cache.headers())
        if not self.cache.finished or len(headers) < self.cache.shards:
            raise UserError(
                f"the latent cache in {self.cache.folder} is incomplete: {len(headers)} of {self.cache.shards} shards "
                f"are whole; run build_cache again, it makes only what is missing"
            )
        self.records: list[Record] = [record for header in headers.values() for record in header["records"]]
        self.skipped: list[Skipped] = [item for header in headers.values() for item in header["skipped"]]
        self._text_shard = {caption: shard for shard, header in headers.items() for caption in header["captions"]}
        if not self.records:
            raise UserError(f"no picture in the latent cache {self.cache.folder}; skipped: {_listed(self.skipped)}")
        self.sizes = tuple(sorted({(record.height, record.width) for record in self.records}, reverse=True))
        self.bucket_of = [self.sizes.index((record.height, record.width)) for record in self.records]
        self._open: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        file = self._file(record.shard)
        return {
            "latents": file.get_tensor(f"{record.row:05d}.latents").float(),
            "guidance_latents": file.get_tensor(f"{record.row:05d}.{guidance_name(self.scale)}").float(),
            "text": self.text(record.caption),
            "caption": record.caption,
            "name": record.name,
        }

    def text(self, caption: str) -> dict[str, Tensor]:
        """Embeddings of a caption that the cache has; the empty one always is.

        Raises:
            UserError: for any other.
        """
        if caption not in self._text_shard:
            raise UserError(f"the latent cache in {self.cache.folder} has no caption {caption!r}")
        file = self._file(self._text_shard[caption])
        prefix = f"text.{caption_key(caption)}."
        return {name.removeprefix(prefix): file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}

    def _file(self, shard: int) -> Any:
        if shard not in self._open:
            if len(self._open) >= MOST_OPEN:
                self._open.clear()
            self._open[shard] = safe_open(self.cache.path(shard), framework="pt")
        return self._open[shard]

    def _choose_scale(self, scale: float | None) -> float:
        scales = self.cache.fingerprint.get("scales", [])
        if scale is None and len(scales) == 1:
            return scales[0]
        if scale is None or float(scale) not in scales:
            raise UserError(f"the latent cache in {self.cache.folder} has guidance at scales {scales}, not {scale}")
        return float(scale)


def _read_items(dataset: Any, places: range, workers: int) -> tuple[list[dict[str, Any]], list[Skipped]]:
    """Items at these places; the n-th pass over the dataset shows its n-th epoch."""
    items: list[dict[str, Any]] = []
    skipped: list[Skipped] = []
    for epoch in range(places[0] // len(dataset), places[-1] // len(dataset) + 1):
        indices = [place % len(dataset) for place in places if place // len(dataset) == epoch]
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(epoch)
        for item in DataLoader(Subset(dataset, indices), batch_size=None, num_workers=min(workers, len(indices))):
            if isinstance(item, BrokenPhoto):
                skipped.append(Skipped(item.name, item.reason))
                log.warning("skipped %s", skipped[-1])
            else:
                items.append(item)
    return items, skipped


def _encode_items(
    items: Sequence[dict[str, Any]],
    encode_image: EncodeImage,
    scales: Sequence[float],
    token: int,
    max_tokens: int | None,
    dtype: torch.dtype,
    batch_size: int,
) -> list[dict[str, Tensor]]:
    """Tensors by name of each item, in the items' order; pictures of one size go through the encoder together."""
    by_size: dict[torch.Size, list[int]] = {}
    for row, item in enumerate(items):
        by_size.setdefault(item["image"].shape, []).append(row)
    encoded: list[dict[str, Tensor]] = [{} for _ in items]
    for rows in by_size.values():
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            images = torch.stack([items[row]["image"] for row in batch])
            latents, reduced = encode_pictures(images, encode_image, scales, token, max_tokens)
            tensors = {"latents": latents} | {guidance_name(scale): value for scale, value in reduced.items()}
            for name, tensor in tensors.items():
                for row, value in zip(batch, as_stored(tensor, dtype).cpu(), strict=True):
                    encoded[row][name] = value.clone()
    return encoded


def _encode_captions(
    captions: Sequence[str], encode_text: EncodeText, dtype: torch.dtype, batch_size: int
) -> dict[str, dict[str, Tensor]]:
    encoded: dict[str, dict[str, Tensor]] = {}
    for start in range(0, len(captions), batch_size):
        batch = captions[start : start + batch_size]
        with torch.no_grad():
            tensors = text_tensors(encode_text, batch)
        for row, caption in enumerate(batch):
            encoded[caption] = {name: as_stored(tensor[row], dtype).clone() for name, tensor in tensors.items()}
    return encoded


def _warn_if_tight(cache: LatentCache, shard: int, shards: int) -> None:
    """Say early that the disk will probably not hold the rest, judged by one shard."""
    needed = cache.path(shard).stat().st_size * (shards - 1)
    free = shutil.disk_usage(cache.folder).free
    if needed > free:
        log.warning(
            "the latent cache in %s will need about %.1f GiB more, but only %.1f GiB are free",
            cache.folder,
            needed / 2**30,
            free / 2**30,
        )


def _listed(skipped: Sequence[Skipped]) -> str:
    return "; ".join(map(str, skipped[:5])) + ("; ..." if len(skipped) > 5 else "")
