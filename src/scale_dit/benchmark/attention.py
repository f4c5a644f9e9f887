"""Times of one attention layer, sparse and dense, in one run and interleaved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from scale_dit.attention import backends
from scale_dit.benchmark import gate
from scale_dit.benchmark.contestants import DENSE, LIBRARIES, Case, Contestant, settings_of
from scale_dit.benchmark.roofline import Card, measures, work_of
from scale_dit.benchmark.timing import interleaved, median, need_gpu
from scale_dit.errors import UserError
from scale_dit.evaluation.studies import add_rows
from scale_dit.grid import Grid
from scale_dit.layout import Layout

HALOS = {"disjoint": 0, "official": 8}
TOKEN_PX, CELL, WINDOW, SCALE = 16, 8, 16, 4
KEYS = ("px", "pattern", "order", "backend", "pass")
TRIAL_ROUNDS = 3


def layout_of(px: int, pattern: str, order: str, text: int) -> Layout:
    """Who reads whom in a picture of `px` x `px` with a quarter of its sides as draft."""
    side = px // TOKEN_PX
    return Layout(
        text, Grid(side, side, CELL), Grid(side // SCALE, side // SCALE, CELL),
        window=WINDOW, halo=HALOS[pattern], order=order,
    )  # fmt: skip


@dataclass
class AttentionBenchmark:
    """See `configs/kernel/attention.yaml` for the meaning of the fields.

    Raises:
        UserError: a backend, pattern or pass is unknown.
    """

    sizes: Sequence[int]
    patterns: Sequence[str]
    orders: Sequence[str]
    backends: Sequence[str]
    passes: Sequence[str]
    rounds: int
    longest_seconds: float
    heads: int
    head_dim: int
    text: int
    _settings: dict[tuple[str, str, str, str], dict[str, int]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for given, allowed, name in (
            (self.backends, [*backends(), *LIBRARIES, *DENSE], "backend"),
            (self.patterns, list(HALOS), "pattern"),
            (self.passes, ["forward", "forward_backward"], "pass"),
        ):
            if unknown := [each for each in given if each not in allowed]:
                raise UserError(f"unknown {name} '{unknown[0]}': use one of {', '.join(allowed)}")

    def run(self, table: Path) -> None:
        """Check and time every case, and add rows to a table as they are measured.

        Raises:
            UserError: there is no CUDA GPU.
        """
        need_gpu()
        card = Card.measured()
        print(
            f"{torch.cuda.get_device_name()}: bf16 matrix product {card.flops / 1e12:.0f} TFLOP/s, "
            f"copy {card.bytes / 1e9:.0f} GB/s",
            flush=True,
        )
        too_long: set[tuple[str, str]] = set()
        for px, pattern, order, kind in product(self.sizes, self.patterns, self.orders, self.passes):
            names = [each for each in self.backends if (each, kind) not in too_long]
            for name, row, seconds in self._rows((px, pattern, order, kind), names, card):
                if seconds > self.longest_seconds:
                    too_long.add((name, kind))
                print(*row.values(), flush=True)
                add_rows(table, [row], KEYS)
            torch._dynamo.reset()  # what comes next would be looked up behind what was compiled for this
            torch.cuda.empty_cache()

    def _rows(
        self, key: tuple[int, str, str, str], names: Sequence[str], card: Card
    ) -> list[tuple[str, dict[str, object], float]]:
        """Names, rows and first times in seconds of those that ran."""
        px, pattern, order, kind = key
        case, with_gradients = self.case(px, pattern, order), kind == "forward_backward"
        ready = self._ready(case, (pattern, order, kind), names)
        calls: dict[str, Callable[[], object]] = {
            name: partial(contestant.run, with_gradients) for name, (contestant, _) in ready.items()
        }
        rows = []
        for name, times in interleaved(calls, self.rounds, self.longest_seconds).items():
            contestant, columns = ready[name]
            work = work_of(case.layout, self.heads, self.head_dim, name in DENSE, with_gradients)
            row: dict[str, object] = dict(zip(KEYS, (px, pattern, order, name, kind), strict=True))
            row |= measures(times, work, card) | columns | {"settings": contestant.settings}
            rows.append((name, row, times.device[0] / 1000))
        return rows

    def case(self, px: int, pattern: str, order: str) -> Case:
        """Random streams of a picture of `px` x `px`, each stream packed as a projection would leave it."""
        layout = layout_of(px, pattern, order, self.text)
        generator = torch.Generator("cuda").manual_seed(0)

        def stream(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
            shape = (1, tokens, 3, self.heads, self.head_dim)
            packed = torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)
            query, key, value = (part.requires_grad_() for part in packed.unbind(2))
            return query, key, value

        return Case(layout, stream(layout.text), stream(layout.image.tokens), stream(layout.guidance_tokens)[1:])

    def _ready(
        self, case: Case, kind: tuple[str, str, str], names: Sequence[str]
    ) -> dict[str, tuple[Contestant, dict[str, str]]]:
        """Contestants that run here and passed the gate, warm, with their errors and memory as columns.

        `extra_mib` is the most that is allocated at a time beside what there was before, outputs and gradients: the
        log-sum-exp is in it, and so are tables of the layout that the first call makes and the others find.

        Why the others do not run is printed.
        """
        ready: dict[str, tuple[Contestant, dict[str, str]]] = {}
        with_gradients = kind[-1] == "forward_backward"
        if with_gradients:
            _ = case.exact_gradients, case.joined_upstream  # now, so that their memory is nobody's
        for name in names:
            try:
                contestant = case.contestant(name, self._fastest(case, kind, name))
                held = torch.cuda.memory_allocated()
                outputs, gradients = contestant.run(with_gradients)
                errors = gate.errors(case, name, outputs, gradients)
                problem = errors.problem
                held += sum(part.nbytes for part in (*outputs, *gradients))
                del outputs, gradients
                if problem is None:
                    extra = _peak(partial(contestant.run, with_gradients)) - held
                    ready[name] = contestant, {"extra_mib": f"{extra / 2**20:.1f}"} | errors.columns
            except Exception as error:  # whatever a library raises where it does not run, and no memory
                problem = _first_line(error)
            if problem:
                print(f"{name} is not timed: {problem}", flush=True)
                torch.cuda.empty_cache()
        return ready

    def _fastest(self, case: Case, kind: tuple[str, str, str], name: str) -> dict[str, int]:
        """The fastest of a contestant's settings, tried out at the first size that comes and kept for the others.

        Raises:
            UserError: it does not run here, whatever the settings.
        """
        key = (name, *kind)
        if len(settings_of(name)) > 1 and key not in self._settings:
            tried: list[tuple[float, dict[str, int]]] = []
            for settings in settings_of(name):
                try:
                    call = partial(case.contestant(name, settings).run, kind[-1] == "forward_backward")
                    tried.append((median(interleaved({"call": call}, TRIAL_ROUNDS)["call"].device), settings))
                except UserError:
                    raise
                except Exception as error:
                    print(f"{name} {settings} does not run: {_first_line(error)}", flush=True)
                else:
                    print(f"{name} {settings}: {tried[-1][0]:.3f} ms", flush=True)
            self._settings[key] = min(tried, key=lambda trial: trial[0])[1] if tried else {}
        return self._settings.get(key, {})


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0][:200] if isinstance(error, UserError) else f"{type(error).__name__}: {''.join(lines[:1])[:200]}"


def _peak(call: Callable[[], object]) -> int:
    """Most bytes that are allocated at a time during a call."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()
