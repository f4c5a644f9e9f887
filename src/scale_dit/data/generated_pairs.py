"""Lightning data module over pairs that `python src/make_pairs.py` made: nothing is encoded again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from scale_dit.data.cache import CachedLatents
from scale_dit.data.cache_store import ENCODED, INDEX, LatentCache, encoder_weights
from scale_dit.data.cached_pairs import CachedPairs
from scale_dit.errors import UserError
from scale_dit.method import Method
from scale_dit.models.settings import BaseSettings


class GeneratedPairs(CachedPairs):
    """Pictures of a base and their drafts, for `ScaleDiTModule`. Batches are those of `CachedPairs`.

    Args:
        path: The folder of the pairs.
        base: What is trained on them.
        method: How; it says which of the drafts are read.
        batch_size: Pictures a step and device.
        seed: Order of the batches.

    Raises:
        UserError: No pairs at `path`, not all of them, or such as this base or method cannot be trained on; before
            weights are loaded, wherever these are in a local folder.
    """

    def __init__(
        self, path: str | Path | None, base: BaseSettings, method: Method, batch_size: int = 16, seed: int = 0
    ):
        super().__init__(batch_size, seed)
        if path is None:
            raise UserError("there is no folder of pairs to train on: give one with data.path=<folder>")
        self.path, self.base = Path(path).expanduser(), base
        again = f"python src/make_pairs.py resume={self.path}"
        if not (self.path / ENCODED / INDEX).is_file():
            raise UserError(
                f"no training pairs in {self.path} (no {ENCODED}/{INDEX}): make some with "
                f"python src/make_pairs.py prompts_file=<file> output={self.path}, or use data=photos for photographs"
            )
        cache = LatentCache(self.path / ENCODED)
        if not cache.finished:
            raise UserError(f"the pairs in {self.path} are not all made yet: go on with: {again}")
        self._check(cache.fingerprint, method)
        if Path(base.path).is_dir():
            self._check_weights(cache.fingerprint)
        try:
            self.latents = CachedLatents(self.path / ENCODED, method.scale)
        except UserError as error:
            raise UserError(f"pairs in {self.path} are missing or damaged: make them again with: {again}") from error
        for height, width in self.latents.sizes:
            method.plan(base, height, width)  # says what cannot be

    def setup(self, stage: str) -> None:
        """See that the loaded weights are those of the pairs."""
        self._check_weights(self.latents.cache.fingerprint)

    @property
    def content(self) -> str:
        """Digest of what was encoded, and of which prompts."""
        cache = self.latents.cache
        pictures = [(record.name, record.caption, record.height, record.width) for record in self.latents.records]
        return hashlib.sha256(json.dumps([cache.fingerprint, pictures], sort_keys=True).encode()).hexdigest()[:16]

    def _check(self, made: dict[str, Any], method: Method) -> None:
        """Refuse pairs for other tokens, texts or drafts.

        Raises:
            UserError: Naming each difference and what removes it.
        """
        asked: dict[str, int | None] = {"token": self.base.token_size, "text_length": self.base.text_length}
        remedies = {"token": "base=", "text_length": "base.text_length=", "max_tokens": "pattern="}
        if method.guidance:
            asked["max_tokens"] = method.guidance_tokens
        names = {"token": "px a token", "text_length": "text tokens", "max_tokens": "most tokens of a draft"}
        wrong = [
            f"{names[key]}: {made.get(key)} in the pairs, {value} now ({remedies[key]}...)"
            for key, value in asked.items()
            if made.get(key) != value
        ]
        scales = made.get("scales", [])
        if method.scale not in scales:
            ways = " or ".join(f"scale={scale:g}" for scale in scales)
            wrong.append(f"drafts {method.scale:g} times smaller are not among them ({ways})")
        if wrong:
            raise UserError(
                f"the pairs in {self.path} were made for something else: {'; '.join(wrong)}. Change these, or make "
                f"pairs for it with python src/make_pairs.py base={self.base.name} 'scales=[{method.scale:g}]'"
            )

    def _check_weights(self, made: dict[str, Any]) -> None:
        """Refuse pairs of a base with another autoencoder or other text encoders.

        Raises:
            UserError: They are.
        """
        if made.get("base") != encoder_weights(self.base):
            raise UserError(
                f"the pairs in {self.path} were made with another base than {self.base.name!r} ({self.base.path}): its "
                f"autoencoder or text encoders differ. Give the base that made them (base=...), or make pairs with "
                f"this one: python src/make_pairs.py base={self.base.name} ..."
            )
