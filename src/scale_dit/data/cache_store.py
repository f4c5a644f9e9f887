"""The cache's files: one index, and shards of latents and text embeddings that are whole or not there."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from scale_dit.data.sources import Skipped
from scale_dit.errors import UserError
from scale_dit.files import write_atomically
from scale_dit.models.settings import BaseSettings

log = logging.getLogger(__name__)

FORMAT = 1
INDEX = "index.json"
ENCODED = "encoded"
"""Subfolder of a folder of generated pairs that holds their cache."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Record:
    """One cached picture: its row in its shard, name, caption and size in pixels."""

    shard: int
    row: int
    name: str
    caption: str
    height: int
    width: int


class LatentCache:
    """A folder of cached latents and text embeddings.

    `index.json` holds the fingerprint, the number of shards, and whether all are there. `shard-00000.safetensors`
    holds the latents of its pictures, the embeddings of those captions that no other shard had when it was written, and
    in its header the list of its pictures.

    Args:
        folder: of the cache; made when the first file is written.
        fingerprint: plain values that decide what is in it, nested as needed. None: whatever the folder holds.
        records_per_shard: of a new cache; one that is there keeps its own.

    Raises:
        UserError: the folder's fingerprint differs, with the parts that do; or the index is damaged, of another
            version, or not there though no fingerprint was given.
    """

    def __init__(
        self, folder: str | Path, fingerprint: Mapping[str, Any] | None = None, records_per_shard: int = 256
    ) -> None:
        self.folder = Path(folder).expanduser()
        self.fingerprint: dict[str, Any] = {} if fingerprint is None else json.loads(json.dumps(fingerprint))
        self.records_per_shard = records_per_shard
        self.shards = 0
        self.finished = False
        index = self._read_index()
        if index is None and fingerprint is None:
            raise UserError(f"no latent cache in {self.folder} (no {INDEX}); build one first with build_cache")
        if index is not None:
            if fingerprint is not None:
                self._compare(index["fingerprint"])
            self.fingerprint = index["fingerprint"]
            self.records_per_shard = index["records_per_shard"]
            self.shards = index["shards"]
            self.finished = index["finished"]

    def path(self, shard: int) -> Path:
        """Of one shard."""
        return self.folder / f"shard-{shard:05d}.safetensors"

    def write_index(self, shards: int, finished: bool) -> None:
        """Say how many shards there are to be, and whether all are there."""
        self.shards, self.finished = shards, finished
        index = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "records_per_shard": self.records_per_shard,
            "shards": shards,
            "finished": finished,
        }
        self._write(self.folder / INDEX, (json.dumps(index, indent=2) + "\n").encode())

    def remove_partial_files(self) -> None:
        """Delete what a process that was killed while writing has left."""
        for file in self.folder.glob(".*.part"):
            file.unlink()

    def write_shard(
        self,
        shard: int,
        pictures: Sequence[Mapping[str, Tensor]],
        records: Sequence[Record],
        texts: Mapping[str, Mapping[str, Tensor]],
        skipped: Sequence[Skipped],
    ) -> None:
        """Write one shard, whole or not at all.

        Args:
            shard: its number.
            pictures: tensors by name of each picture.
            records: as many.
            texts: tensors by name of each caption that is stored here.
            skipped: pictures that could not be read.

        Raises:
            UserError: the disk is full or cannot be written.
        """
        tensors = {f"{row:05d}.{name}": tensor for row, item in enumerate(pictures) for name, tensor in item.items()}
        for caption, item in texts.items():
            tensors |= {f"text.{caption_key(caption)}.{name}": tensor for name, tensor in item.items()}
        header = {
            "records": [[item.name, item.caption, item.height, item.width] for item in records],
            "captions": list(texts),
            "skipped": [[item.name, item.reason] for item in skipped],
        }
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        self._write(self.path(shard), save(tensors, metadata={"contents": json.dumps(header)}))

    def header(self, shard: int) -> dict[str, Any] | None:
        """Records, captions and skipped pictures of a shard; None if it is not there.

        Raises:
            SafetensorError: truncated or damaged.
        """
        if not self.path(shard).is_file():
            return None
        with safe_open(self.path(shard), framework="pt") as file:
            metadata = file.metadata() or {}
        try:
            header = json.loads(metadata["contents"])
            records = [Record(shard, row, *fields) for row, fields in enumerate(header["records"])]
            skipped = [Skipped(*fields) for fields in header["skipped"]]
            return {"records": records, "captions": header["captions"], "skipped": skipped}
        except (KeyError, ValueError, TypeError) as error:
            raise SafetensorError(f"no list of records in its header ({error})") from error

    def headers(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Headers of those shards that are whole; damaged ones are named in a warning."""
        for shard in range(self.shards):
            try:
                header = self.header(shard)
            except SafetensorError as error:
                log.warning("%s is damaged (%s)", self.path(shard), error)
                continue
            if header is not None:
                yield shard, header

    def _read_index(self) -> dict[str, Any] | None:
        path = self.folder / INDEX
        if not path.is_file():
            return None
        try:
            index = json.loads(path.read_text())
            version = index["format"]
            missing = {"fingerprint", "records_per_shard", "shards", "finished"} - index.keys()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({error}); delete the folder {self.folder} to build it anew") from error
        if version != FORMAT or missing:
            raise UserError(
                f"{path} is of format {version}, this version reads format {FORMAT}; "
                f"delete the folder {self.folder} to build it anew"
            )
        return index

    def _compare(self, cached: Mapping[str, Any]) -> None:
        differences = fingerprint_differences(cached, self.fingerprint)
        if differences:
            raise UserError(
                f"the latent cache in {self.folder} was built for something else: {'; '.join(differences)}. "
                f"Choose another folder, or delete this one to build it anew"
            )

    def _write(self, path: Path, data: bytes) -> None:
        try:
            write_atomically(path, data)
        except OSError as error:
            if error.errno in _FULL:
                free = shutil.disk_usage(path.parent).free
                raise UserError(
                    f"no room for {path} ({len(data) / 2**20:.1f} MiB needed, {free / 2**20:.1f} MiB free: "
                    f"{error.strerror}); the shards before it are whole: free some space and run the same command "
                    f"again to go on from there"
                ) from error
            raise UserError(f"cannot write {path}: {error.strerror or error}; choose another folder") from error


def caption_key(caption: str) -> str:
    """Name of a caption's embeddings in the shards."""
    return hashlib.sha256(caption.encode()).hexdigest()[:16]


def guidance_name(scale: float) -> str:
    """Name of the drafts' latents of a scale in the shards."""
    return f"guidance.{float(scale):g}"


def fingerprint_differences(cached: Mapping[str, Any], asked: Mapping[str, Any], prefix: str = "") -> list[str]:
    """One line for each part that differs, such as `data.crops.size: cached [256, 256], asked for [512, 512]`."""
    lines = []
    for key in sorted(cached.keys() | asked.keys()):
        old, new = cached.get(key, "nothing"), asked.get(key, "nothing")
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += fingerprint_differences(old, new, f"{prefix}{key}.")
        elif old != new:
            lines.append(f"{prefix}{key}: cached {old}, asked for {new}")
    return lines


def weights_fingerprint(
    folder: str | Path,
    parts: Sequence[str] = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
) -> str:
    """Hash of those weights of a diffusers folder that latents and text embeddings depend on.

    Small files are hashed whole, large ones by size, beginning and 64 evenly spaced samples: two sets of trained
    weights differ nearly everywhere, and reading 10 GB at every start would cost a minute.

    Raises:
        UserError: if the folder has none of the parts.
    """
    root = Path(folder)
    files = [file for part in parts for file in sorted((root / part).rglob("*")) if file.is_file()]
    if not files:
        raise UserError(f"no weights in {root}: expected a diffusers folder with {', '.join(parts)}")
    digest = hashlib.sha256()
    for file in files:
        _sample(digest, file, file.relative_to(root).as_posix())
    return digest.hexdigest()[:16]


def file_fingerprint(file: str | Path) -> str:
    """Hash of one file of weights, as `weights_fingerprint` has it; wherever it lies."""
    digest = hashlib.sha256()
    _sample(digest, Path(file), "")
    return digest.hexdigest()[:16]


def _sample(digest: Any, file: Path, name: str) -> None:
    size = file.stat().st_size
    digest.update(f"{name}\0{size}\0".encode())
    with file.open("rb") as stream:
        if size <= 2**20:
            digest.update(stream.read())
            return
        for position in range(0, size, size // 64):
            stream.seek(position)
            digest.update(stream.read(4096))


def encoder_weights(settings: BaseSettings) -> str:
    """Names the weights of the encoders of a base that is in a local folder or in the hub's local store."""
    from huggingface_hub import hf_hub_download

    folder = Path(settings.path)
    if not folder.is_dir():
        folder = Path(hf_hub_download(settings.path, "model_index.json", local_files_only=True)).parent
    return weights_fingerprint(folder)


def as_stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Floating-point tensors in the cache's precision; masks and ids as they are."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
