"""What a picture will take, stage by stage, and which way of saving memory lets it fit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

from scale_dit.autoencoder import Decoding
from scale_dit.autoencoder.memory import encode_bytes, host_bytes
from scale_dit.errors import UserError
from scale_dit.planning.components import Components, blocks_of
from scale_dit.planning.machine import Machine
from scale_dit.planning.memory import WORKSPACE, Memory, Weights, peaks
from scale_dit.planning.trace import Trace
from scale_dit.planning.work import Tracer, Work

STAGES = ("text", "draft", "refine", "decode")
FP8_CAST_BYTES = 3
"""Bytes that are moved to widen a number from 8 bits to 16."""
PLANES = 1.5
"""Bytes that a streamed decoder moves, in those of its convolutions: norms and residuals read again."""
SIZE_STEP = 0.97


@dataclass(frozen=True)
class Prediction:
    """Of one picture of `height` x `width` px, made in the given way.

    Attributes:
        seconds, peak_bytes: By stage; stages that do not run are left out.
        guidance_seconds: Of the refinement's guidance passes.
        first: Seconds, by stage, that the first picture of a process takes beyond those: host memory is pinned,
            libraries are loaded.
    """

    height: int
    width: int
    memory: Memory
    seconds: dict[str, float]
    peak_bytes: dict[str, int]
    guidance_seconds: float = 0.0
    first: Mapping[str, float] = field(default_factory=dict)

    def as_first(self) -> Prediction:
        """Where it is the first picture of a process."""
        return replace(self, seconds={stage: each + self.first.get(stage, 0.0) for stage, each in self.seconds.items()})

    def in_boxes(self, share: float) -> Prediction:
        """Where the base computes boxes that add up to a share of the picture at each step, above 1 beside the whole.

        Peaks are those of the whole, which are not exceeded.
        """
        refine = share * (self.seconds["refine"] - self.guidance_seconds) + self.guidance_seconds
        return replace(self, seconds=self.seconds | {"refine": refine})

    @property
    def peak(self) -> int:
        """Most bytes of all stages."""
        return max(self.peak_bytes.values())


@dataclass
class Planner:
    """Predicts and chooses for pictures on one base and machine.

    Args:
        tracer: Says what there is to do.
        components: The base's parts without weights.
        machine: Says how fast it is done.
        settings: What the user leaves open, and what not.
        on_gpu: Whether pictures are made on a GPU.
    """

    tracer: Tracer
    components: Components
    machine: Machine
    settings: Memory
    on_gpu: bool
    weights: Weights = field(init=False)

    def __post_init__(self) -> None:
        self.weights = Weights.of(self.components, self.settings.weights)
        self.ways = list(self.settings.ways(self.on_gpu, self.tracer.sampling.wrap != "none"))
        self.predict = lru_cache(maxsize=None)(self._predict)

    def _predict(self, height: int, width: int, way: Memory) -> Prediction:
        """Seconds and peak bytes of every stage of a picture."""
        work = self.tracer.work(height, width, way.tokens)
        blocks = len(blocks_of(self.components.transformer))
        peak_bytes = peaks(work, self.weights, way, blocks)
        seconds = self._seconds(work, way)
        seconds = {name: seconds[name] for name in peak_bytes}
        return Prediction(height, width, way, seconds, peak_bytes, self._guidance(work, way), self._first(work, way))

    def _seconds(self, work: Work, way: Memory) -> dict[str, float]:
        spent = self.machine.seconds
        copied = {stage: moved / self.machine.host_copy for stage, moved in self._copied(way).items()}
        draft = self._passes("draft", work.draft, work.draft_steps, way, work.draft_branches)
        read = self._kept_on_host(work, way)
        refine = self._passes("refine", work.refine, work.refine_steps, way, work.refine_branches, read)
        refine += self._guidance(work, way)
        text = spent(work.text, self.machine.text_launch)
        decode = self._in_practice("decode", spent(work.decode[way.decode]))
        if way.decode == "host":
            decode = self._on_host(decode, work.decode["whole"])
        found = {"text": text, "draft": draft, "refine": refine, "decode": decode}
        return {stage: seconds + copied[stage] for stage, seconds in found.items()}

    def _first(self, work: Work, way: Memory) -> dict[str, float]:
        """Seconds that the first picture of a process takes beyond others."""
        on_host = work.host_bytes if way.decode == "host" else 0
        return {
            "text": self.machine.first_encoding,
            "refine": self.machine.pinning_seconds(self._kept_on_host(work, way)),
            "decode": self.machine.pinning_seconds(on_host),
        }

    @staticmethod
    def _kept_on_host(work: Work, way: Memory) -> int:
        """Bytes of the draft's keys and values in host memory."""
        return work.guidance.kept if work.guidance is not None and way.keys_values == "host" else 0

    def _guidance(self, work: Work, way: Memory) -> float:
        """Seconds of the guidance passes of a picture: one, or one a step where edges join."""
        if work.guidance is None:
            return 0.0
        passes = 1 if self.tracer.sampling.wrap == "none" else work.refine_steps
        written = self._kept_on_host(work, way) / self.machine.host_copy
        return self._passes("refine", work.guidance, passes, way) + passes * written

    def _passes(
        self, stage: str, step: Trace | None, count: int, way: Memory, branches: int = 1, read: int = 0
    ) -> float:
        """Seconds of `count` steps; what is not on the card comes while it computes, or it waits.

        Args:
            branches: How often a step calls the transformer, all of which are in `step`.
            read: Bytes that come from host memory beside weights, at each of them.
        """
        if step is None:
            return 0.0
        seconds = self.machine.seconds(step) + branches * FP8_CAST_BYTES * self.weights.cast / self.machine.bandwidth
        seconds = self._in_practice(stage, seconds) + self.machine.between_steps
        if way.offload == "group":
            brought = branches * (self.weights.blocks + read)
            seconds = max(seconds, brought / (self.machine.group_copy or self.machine.host_copy))
        return count * seconds

    def _in_practice(self, stage: str, seconds: float) -> float:
        return self.machine.practice.get(stage, 1.0) * seconds

    def encoded(self, found: Prediction, sizes: Sequence[tuple[int, int]], limit: int) -> Prediction:
        """Where pictures of these sizes (height, width) are encoded, and no draft is made.

        It takes the stage of the draft. How pictures are encoded is chosen for the memory that is free then.

        Args:
            found: With a draft.
            limit: Bytes that may be used.
        """
        moves = found.memory.offload == "model"
        seconds, peak_bytes = dict(found.seconds), dict(found.peak_bytes)
        if moves and {"draft", "refine"} <= seconds.keys():  # the transformer comes a stage later
            seconds["refine"] += self.weights.transformer / self.machine.host_copy
        seconds.pop("draft", None)
        peak_bytes.pop("draft", None)
        pinned = 0
        if sizes:
            each = [self._encoding(*size, found.memory, limit) for size in sizes]
            moved = self.weights.autoencoder / self.machine.host_copy if moves else 0.0
            seconds["draft"] = moved + sum(one for one, _, _ in each)
            peak_bytes["draft"] = max(peak for _, peak, _ in each)
            pinned = max(host for _, _, host in each)
        first = {**found.first, "draft": self.machine.pinning_seconds(pinned)}
        return replace(found, seconds=seconds, peak_bytes=peak_bytes, first=first)

    def _encoding(self, height: int, width: int, way: Memory, limit: int) -> tuple[float, int, int]:
        """Seconds, peak bytes and bytes of host memory of encoding a picture."""
        vae, device = self.components.modules["vae"], self.tracer.device
        held = self.weights.resident(way.offload)["decode"] + WORKSPACE
        needed = partial(encode_bytes, device=device)
        mode = Decoding().choice(vae, height, width, limit - held, needed, device)
        work = self.tracer.encoding(height, width, mode == "whole")
        seconds = self._in_practice("decode", self.machine.seconds(work))
        pinned = 0
        if mode == "host":
            seconds = self._on_host(seconds, work)
            pinned = host_bytes(vae, height, width, encoding=True)
        return seconds, held + (work.peak if mode == "whole" else needed(vae, height, width, mode)), pinned

    def _on_host(self, computed: float, work: Trace) -> float:
        """Seconds of an autoencoder whose planes come and go while others are computed."""
        return max(computed, planes(work) / self.machine.host_copy)

    def _copied(self, way: Memory) -> dict[str, int]:
        """Bytes of weights that go to the card at the beginning of a stage."""
        copied = dict.fromkeys(STAGES, 0)
        parts = self.weights
        if way.offload == "group":
            return copied | {"text": sum(parts.text)}
        if way.offload != "model":
            return copied
        return {
            "text": sum(parts.text), "draft": parts.transformer, "refine": 0, "decode": parts.autoencoder,
        }  # fmt: skip

    def choose(self, sizes: Sequence[tuple[int, int]], limit: int) -> Memory:
        """The fastest way in which pictures of all sizes (height, width) fit into `limit` bytes.

        Raises:
            UserError: There is none; with the largest size of the same shape that fits.
        """
        largest = max(sizes, key=math.prod)
        way = self._way(largest, limit)
        if way is None:
            raise UserError(self._refusal(*largest, limit))
        return way

    def _way(self, size: tuple[int, int], limit: int) -> Memory | None:
        """The fastest way in which a picture fits."""
        return next((way for way in self.ways if self.predict(*size, way).peak <= limit), None)

    def _refusal(self, height: int, width: int, limit: int) -> str:
        least = min((self.predict(height, width, way) for way in self.ways), key=lambda found: found.peak)
        stage = max(least.peak_bytes, key=lambda name: least.peak_bytes[name])
        message = (
            f"a picture of {width} x {height} px needs {gb(least.peak)} GB in the stage {stage!r}, even with "
            f"{least.memory}, but {gb(limit)} GB are free"
        )
        size = self._largest(height, width, limit)
        if size is None:
            return f"{message}; so little that not even a small picture fits: use a card with more memory, or base=tiny"
        return f"{message}. The largest of this shape that fits: height={size[0]} width={size[1]}"

    def _largest(self, height: int, width: int, limit: int) -> tuple[int, int] | None:
        """The largest size of the same shape that fits, found by halving between the smallest one and this one."""
        base = self.tracer.base
        fits, above = base.token_size * (self.tracer.method.window or base.window) / min(height, width), 1.0
        if self._way(self._sized(height, width, fits), limit) is None:
            return None
        while fits < SIZE_STEP * above:
            side = math.sqrt(fits * above)
            if self._way(self._sized(height, width, side), limit) is None:
                above = side
            else:
                fits = side
        return self._sized(height, width, fits)

    def _sized(self, height: int, width: int, share: float) -> tuple[int, int]:
        """A size `share` as large a side, in whole tokens."""
        token = self.tracer.base.token_size
        return max(1, int(height * share) // token) * token, max(1, int(width * share) // token) * token


def planes(work: Trace) -> int:
    """Bytes of an autoencoder's activations that go to the host's memory or come from it."""
    operations = work.operations.items()
    return round(PLANES * sum(each.bytes * count for each, count in operations if each.kind == "convolution"))


def gb(count: float) -> str:
    """Bytes as GB (10**9), two digits or more."""
    return f"{count / 1e9:.1f}" if count >= 1e9 else f"{count / 1e9:.2g}"
