"""Ways to make a picture in less memory, what each leaves on the card, and in which order they are tried."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise, product

from torch import nn

from scale_dit.autoencoder.decoding import DECODES
from scale_dit.errors import UserError
from scale_dit.planning.components import Components, blocks_of, castable, size_of
from scale_dit.planning.work import Work

AUTO = "auto"
OFFLOADS = ("none", "text", "model", "group")
KEYS_VALUES = ("device", "host")
WEIGHTS = ("native", "fp8")
PART = 8192
"""Tokens in one part of a feed-forward layer: as fast as the whole, and its hidden layer is 0.2 GB on FLUX.1, where it
would be 1.6 at 4096 px."""
ON_DEVICE_AT_ONCE = 2
"""Blocks of a group-offloaded transformer on the card: the one that runs, and the next one on its way."""
WORKSPACE = 96 * 2**20
"""Bytes that the libraries for matrix products and convolutions take for themselves."""


@dataclass(frozen=True)
class Memory:
    """How memory is saved; `auto` is chosen for the picture and the card.

    Args:
        offload: `none`; `text`: text encoders are dropped once all prompts are encoded; `model`: one part of the base
            at a time is on the card; `group`: a layer of the text encoders, then two blocks of the transformer are.
        feed_forward_tokens: Tokens that go through a feed-forward layer at a time; 0: all.
        keys_values: Where the draft's keys and values are: `device` or `host`.
        decode: `whole`, `streamed`, `host` or `tiled`, see `scale_dit.autoencoder.Decoding`; `tiled` changes the
            picture a little, so it is never chosen by itself.
        weights: The transformer's: `native`, as they are loaded, or `fp8`: stored in 8 bits, computed with as before;
            changes the picture a little, so it is never chosen by itself.
        limit_gb: Use no more than this of the card; `None`: what is free.

    Raises:
        UserError: A value that is none of these.
    """

    offload: str = AUTO
    feed_forward_tokens: int | str = AUTO
    keys_values: str = AUTO
    decode: str = AUTO
    weights: str = "native"
    limit_gb: float | None = None

    def __post_init__(self) -> None:
        for name, allowed in (
            ("offload", (AUTO, *OFFLOADS)),
            ("keys_values", (AUTO, *KEYS_VALUES)),
            ("decode", (AUTO, *DECODES)),
            ("weights", WEIGHTS),
        ):
            if getattr(self, name) not in allowed:
                raise UserError(f"memory.{name} is {getattr(self, name)!r}: use one of {', '.join(allowed)}")
        tokens = self.feed_forward_tokens
        if tokens != AUTO and (isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0):
            raise UserError(f"memory.feed_forward_tokens is {tokens!r}: use auto, 0 (all at once) or such as {PART}")
        if self.limit_gb is not None and not self.limit_gb > 0:
            raise UserError(f"memory.limit_gb is {self.limit_gb}, but it must be positive; null is what is free")

    def ways(self, on_gpu: bool, joined: bool = False) -> Iterator[Memory]:
        """All ways that these settings leave open, the fastest first; without a GPU there is nothing to offload from.

        Args:
            joined: Pictures join themselves at their edges, which the stock decoder cannot do.

        Raises:
            UserError: Offloading is asked for that needs a GPU.
        """
        if self.offload == "model" and not on_gpu:
            raise UserError("memory.offload=model moves parts between a GPU and the host: use none or text on a CPU")
        ladder: tuple[tuple[str, int, str], ...] = (
            ("none", PART, "device"),
            ("text", PART, "device"),
            ("text", PART, "host"),
            ("model", PART, "host"),
            ("group", PART, "host"),
        )
        # Untiled is slower on a GPU; on a CPU, where planes are kept is all the same.
        decodes = ("streamed", "host") if on_gpu or joined else ("whole", "streamed")
        steps = ladder if on_gpu else (("none", 0, "device"), ("text", PART, "device"))
        found = []
        for (offload, tokens, place), decode in product(steps, decodes):
            way = replace(
                self,
                offload=offload if self.offload == AUTO else self.offload,
                feed_forward_tokens=tokens if self.feed_forward_tokens == AUTO else self.feed_forward_tokens,
                keys_values=place if self.keys_values == AUTO else self.keys_values,
                decode=decode if self.decode == AUTO else self.decode,
            )
            if way not in found:
                found.append(way)
                yield way

    @property
    def tokens(self) -> int:
        """`feed_forward_tokens` once it is chosen."""
        assert isinstance(self.feed_forward_tokens, int)
        return self.feed_forward_tokens

    def __str__(self) -> str:
        parts = self.feed_forward_tokens
        return (
            f"memory.offload={self.offload} memory.feed_forward_tokens={parts} memory.keys_values={self.keys_values} "
            f"memory.decode={self.decode} memory.weights={self.weights}"
        )


@dataclass(frozen=True)
class Weights:
    """Bytes of a base's weights, as they are stored.

    Attributes:
        text, text_table, text_layers: Of each text encoder, of their largest table of embeddings, and of the largest
            two other layers that follow each other.
        transformer: Of the whole transformer, in its blocks, and of its largest block.
        decoder: Of the autoencoder.
        cast: Numbers that are stored in 8 bits and computed with in more.
    """

    text: tuple[int, ...]
    text_table: int
    text_layers: int
    transformer: int
    blocks: int
    largest_block: int
    autoencoder: int
    cast: int

    @classmethod
    def of(cls, components: Components, kind: str) -> Weights:
        """Those of a base whose transformer is stored as `Memory.weights` says."""
        transformer = components.transformer
        saved = transformer.dtype.itemsize - 1 if kind == "fp8" else 0

        def numbers(module: nn.Module) -> int:
            return castable(module, transformer._skip_layerwise_casting_patterns or ()) if saved else 0

        def stored(module: nn.Module) -> int:
            return size_of(module) - saved * numbers(module)

        encoders = list(components.text_encoders.values())
        layers = [layer for each in encoders for layer in each.modules() if not len(list(layer.children()))]
        others = [size_of(layer) for layer in layers if not isinstance(layer, nn.Embedding)]
        blocks = [stored(block) for block in blocks_of(transformer)]
        return cls(
            tuple(map(size_of, encoders)),
            max((size_of(layer) for layer in layers if isinstance(layer, nn.Embedding)), default=0),
            max((sum(pair) for pair in pairwise(others)), default=0),
            stored(transformer),
            sum(blocks),
            max(blocks),
            size_of(components.modules["vae"]),
            numbers(transformer),
        )

    def resident(self, offload: str) -> dict[str, int]:
        """Bytes of weights on the device in each stage."""
        text, everything = sum(self.text), self.transformer + self.autoencoder
        if offload == "none":
            return dict.fromkeys(("text", "draft", "refine", "decode"), text + everything)
        if offload == "text":
            return {"text": text, "draft": everything, "refine": everything, "decode": everything}
        if offload == "model":
            largest = max(self.text, default=0)
            return {
                "text": largest, "draft": self.transformer, "refine": self.transformer, "decode": self.autoencoder,
            }  # fmt: skip
        outside = self.transformer - self.blocks + self.autoencoder
        running = outside + ON_DEVICE_AT_ONCE * self.largest_block
        return {"text": self.text_layers, "draft": running, "refine": running, "decode": outside}


def peaks(work: Work, weights: Weights, memory: Memory, blocks: int) -> dict[str, int]:
    """Most bytes on the device in each stage."""
    resident = weights.resident(memory.offload)
    kept = work.guidance.kept if work.guidance is not None else 0
    gone = 0 if memory.keys_values == "device" else kept - ON_DEVICE_AT_ONCE * kept // blocks
    working = {"text": work.text.peak, "decode": work.decode_peaks[memory.decode]}
    if work.draft is not None:
        working["draft"] = work.draft.peak
    if work.refine is not None:
        passed = work.guidance.peak if work.guidance is not None else 0
        working["refine"] = max(kept + work.refine.peak, passed) - gone
    if memory.offload == "group":  # embeddings are looked up before anything is computed
        working["text"] = max(working["text"], weights.text_table - resident["text"])
    return {
        stage: resident[stage] + working[stage] + WORKSPACE
        for stage in ("text", "draft", "refine", "decode")
        if stage in working
    }
