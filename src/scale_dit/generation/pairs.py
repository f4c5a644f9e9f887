"""Training pairs: pictures that the base makes, with their latents, their drafts' latents and their texts' embeddings.

Each picture is one shard of a latent cache, so that it is there whole or not at all, and several processes can make
them in any order: what a shard holds depends on its picture and on the list of all, and on nothing that ran before.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError
from torch import Tensor

from scale_dit.data.cache_store import ENCODED, INDEX, LatentCache, Record, encoder_weights, guidance_name
from scale_dit.data.caption_files import METADATA
from scale_dit.data.encoding import encode_drafts, guidance_size
from scale_dit.errors import UserError
from scale_dit.files import write_atomically
from scale_dit.generation.disk import writing
from scale_dit.generation.folder import OutputFolder
from scale_dit.generation.maker import Making
from scale_dit.generation.pictures import Picture
from scale_dit.models import load_family
from scale_dit.models.settings import BaseSettings
from scale_dit.models.text import Text
from scale_dit.resuming import MAKE_PAIRS

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PairSettings:
    """Which drafts pairs have.

    Args:
        scales: Picture side / draft side; one draft each.
        guidance_tokens: Reduce drafts further until they have no more tokens than that, as in the method.

    Raises:
        UserError: No scale, or one below 1.
    """

    scales: Sequence[float] = (4.0,)
    guidance_tokens: int | None = None

    def __post_init__(self) -> None:
        numbers = [value for value in self.scales if isinstance(value, int | float) and not isinstance(value, bool)]
        if not numbers or len(numbers) < len(self.scales) or min(numbers) < 1:
            raise UserError(
                f"scales is {list(self.scales)}, but it must be numbers of at least 1, such as 'scales=[4]'"
            )

    def fingerprint(self, base: BaseSettings) -> dict[str, Any]:
        """What pairs are good for, as plain values of a cache's fingerprint."""
        return {
            "base": encoder_weights(base),
            "text_length": base.text_length,
            "scales": [float(scale) for scale in self.scales],
            "token": base.token_size,
            "max_tokens": self.guidance_tokens,
        }


@dataclass(frozen=True)
class PairFolder(OutputFolder):
    """Where pairs go: pictures as in any output folder, `metadata.jsonl` with their captions, and a latent cache.

    Attributes:
        cache_fingerprint: Of the cache.
        with_text: Pictures that are the first of their prompt: their shards hold its embeddings.
        count: Of all pictures.
    """

    cache_fingerprint: Mapping[str, Any] = field(default_factory=dict)
    with_text: frozenset[int] = frozenset()
    count: int = 0

    program: ClassVar[str] = MAKE_PAIRS
    texts: ClassVar[tuple[str, ...]] = ("",)

    @classmethod
    def of(cls, folder: OutputFolder, pairs: PairSettings, base: BaseSettings, pictures: Sequence[Picture]) -> Self:
        """The folder for pairs.

        Raises:
            UserError: A size whose draft cannot be.
        """
        for height, width in {(picture.height, picture.width) for picture in pictures}:
            for scale in pairs.scales:
                guidance_size(height, width, scale, base.token_size, pairs.guidance_tokens)
        firsts = {picture.prompt: picture.index for picture in reversed(pictures)}
        base.check_weights()
        if not Path(base.path).is_dir():
            load_family(base).stock.download(base.path)  # their content names what was encoded
        settings = {**folder.settings, "pairs": json.loads(json.dumps(asdict(pairs)))}
        return cls(
            folder.path, settings, folder.files, folder.config, folder.decoding,
            pairs.fingerprint(base), frozenset(firsts.values()), len(pictures),
        )  # fmt: skip

    @cached_property
    def cache(self) -> LatentCache:
        """The latents and embeddings.

        Raises:
            UserError: They are of other settings, or damaged.
        """
        return LatentCache(self.path / ENCODED, self.cache_fingerprint, records_per_shard=1)

    def provenance(self, picture: Picture) -> Mapping[str, Any] | None:
        """What the picture says that it was made with; `None` if it or what was encoded of it is not there, whole."""
        return super().provenance(picture) if self._is_encoded(picture) else None

    def pending(self, pictures: Sequence[Picture], goes_on: bool = False, rewrites: bool = False) -> list[Picture]:
        """As of any output folder; a cache that lacks something says so from now on."""
        missing = super().pending(pictures, goes_on, rewrites)
        if missing and (self.cache.finished or self.cache.shards != self.count):
            with writing(self):
                self.cache.write_index(self.count, finished=False)
        return missing

    def keep_pair(self, picture: Picture, tensors: Mapping[str, Tensor], texts: Mapping[str, Text]) -> None:
        """Write a picture's shard.

        Args:
            tensors: `latents` `[C, h, w]` and the drafts' latents, by name.
            texts: Embeddings of captions, of one each, if they are this shard's to hold.

        Raises:
            UserError: It cannot be written.
        """
        by_name = {
            caption: {each.name: getattr(text, each.name)[0].clone() for each in fields(text)}
            for caption, text in texts.items()
        }
        name = self.file(picture).name
        record = Record(picture.index, 0, name, picture.prompt, picture.height, picture.width)
        with writing(self):
            self.cache.write_shard(picture.index, [tensors], [record], by_name, [])

    def finish(self, pictures: Sequence[Picture]) -> Path:
        """Write the lists of pictures and captions, and that all are encoded."""
        entries = [{"file_name": self.file(picture).name, "caption": picture.prompt} for picture in pictures]
        with writing(self):
            lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
            write_atomically(self.path / METADATA, lines)
            self.cache.remove_partial_files()
            self.cache.write_index(self.count, finished=True)
        return super().finish(pictures)

    def remove_earlier(self) -> None:
        """What was encoded goes with the pictures."""
        super().remove_earlier()
        shards = (self.path / ENCODED).glob("shard-*.safetensors")
        for file in (self.path / METADATA, self.path / ENCODED / INDEX, *shards):
            file.unlink(missing_ok=True)

    def _is_encoded(self, picture: Picture) -> bool:
        try:
            header = self.cache.header(picture.index)
        except SafetensorError as error:
            log.warning("%s is damaged and is made again: %s", self.cache.path(picture.index), error)
            return False
        if header is None:
            return False
        captions = set(header["captions"])
        found = [(record.name, record.caption) for record in header["records"]]
        return found == [(self.file(picture).name, picture.prompt)] and captions == self.captions_of(picture)

    def captions_of(self, picture: Picture) -> set[str]:
        """Captions whose embeddings are in a picture's shard; the empty one's, for caption dropout, is in the first."""
        own = {picture.prompt} if picture.index in self.with_text else set()
        return own | ({""} if picture.index == 0 else set())


class PairMaking(Making):
    """One pair in the making: the picture, and what training reads of it."""

    folder: PairFolder
    decode_remedy: ClassVar[tuple[str, ...]] = ("memory=least",)

    def keep(self, latents: Tensor) -> None:
        """Write the pair, and then the picture: where it is, nothing is missing."""
        base = self.pipeline.base
        fingerprint = self.folder.cache_fingerprint
        with self._cost("decode"):
            picture: Tensor = self.pipeline.decode(latents)  # [1, 3, H, W]
            if not torch.isfinite(picture).all():
                raise self.folder.not_finite(self.picture)
            drafts = encode_drafts(
                picture, base.encode_images, fingerprint["scales"], fingerprint["token"], fingerprint["max_tokens"]
            )
        encoded = {"latents": latents, **{guidance_name(scale): draft for scale, draft in drafts.items()}}
        captions = sorted(self.folder.captions_of(self.picture))  # the order of a set differs between processes
        texts = {caption: self.prompts.text if caption else base.encode_prompts([""]) for caption in captions}
        self.folder.keep_pair(self.picture, {name: tensor[0] for name, tensor in encoded.items()}, texts)
        self.folder.keep(self.picture, [picture[0]], self.cost, self.pipeline.decoding)
