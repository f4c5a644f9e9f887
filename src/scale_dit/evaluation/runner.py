"""Compare arms on the same prompts and seeds: make the pictures, measure them, write the report.

Making and measuring are two passes over the same files, so an evaluation that was interrupted goes on where it
stopped, and measures exactly what lies on disk.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scale_dit.errors import UserError
from scale_dit.evaluation.arms import Arm, Generator, as_arms, check_output, chunks
from scale_dit.evaluation.intervals import paired_difference
from scale_dit.evaluation.metric import Metric, Record
from scale_dit.evaluation.picture_grid import write_picture_grid
from scale_dit.evaluation.report import Results, Row, cost_rows, print_results
from scale_dit.evaluation.store import Store, check_arm_names
from scale_dit.picture_files import load_picture, read_provenance
from scale_dit.provenance import commit, machine, running_command, versions_line

log = logging.getLogger(__name__)

Reference = Callable[[Sequence[Record], int, int], Tensor]


def evaluate(
    arms: Mapping[str, Arm | Generator],
    prompts: Sequence[str],
    seeds: Sequence[int],
    metrics: Mapping[str, Metric],
    output_folder: str | Path,
    *,
    scenes: Sequence[Any] | None = None,
    reference: Reference | None = None,
    baseline: str | None = None,
    batch_size: int = 4,
    grid_rows: int = 8,
    summary: Callable[[dict[str, float], Path | None], None] | None = None,
    show: bool = True,
) -> Results:
    """Evaluate arms on paired prompts and seeds.

    Args:
        arms: name -> arm or bare generator; names become folders.
        prompts: one text per picture.
        seeds: one seed per picture; picture i of every arm has prompt i and seed i.
        metrics: fresh metrics; one that is not available is reported as such and the others still run.
        output_folder: pictures, `results.json`, `results.csv`, `pictures.png` (whole) and `crops.png` (at their own
            resolution) go there. Pictures of an earlier,
            interrupted evaluation with the same settings are taken over.
        scenes: the scene that each prompt describes; gives the scene metrics and the true renders.
        reference: makes the true pictures of records at a size, `[B, 3, H, W]`; by default the scenes are rendered.
        baseline: arm that every other arm is compared with, picture by picture.
        batch_size: prompts per call of a generator.
        grid_rows: prompts shown in the picture grid.
        summary: receives the flat numbers and the grid's path at the end, for a logger.
        show: print progress and the table.

    Raises:
        UserError: no prompts, lists of different lengths, an unknown baseline, a name that cannot be a folder, a batch
            size below one, or an arm that returns something else than one picture per prompt.
    """
    _check(arms, prompts, seeds, scenes, baseline, batch_size)
    named, store = as_arms(arms), Store(Path(output_folder))
    missing = {name: reason for name, metric in metrics.items() if (reason := metric.available()) is not None}
    for name, reason in missing.items():
        log.warning("%s will not be measured: %s", name, reason)
    records = [
        Record(index, prompt, seed, scenes[index] if scenes is not None else None)
        for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
    ]
    if reference is None and scenes is not None:
        reference = _render
    working = {name: metric for name, metric in metrics.items() if name not in missing}
    with _progress(show) as progress:
        for name, arm in named.items():
            _make(name, arm, records, store, batch_size, progress)
        for name in named:
            _measure(name, records, working, store, batch_size, reference, progress)
    rows = [row for name in named for row in _rows_of(name, records, working, store)]
    rows += _differences(named, working, baseline)
    rows += [Row("", name, None, note=reason) for name, reason in missing.items()]
    results = Results(rows, list(named), store.folder, information=_information(named, records))
    results.picture_grid = _grid(named, records[:grid_rows], store, reference is not None)
    results.write()
    if show:
        print_results(results)
    if summary is not None:
        summary(results.summary(), results.picture_grid)
    return results


def _check(
    arms: Mapping[str, Any],
    prompts: Sequence[str],
    seeds: Sequence[int],
    scenes: Sequence[Any] | None,
    baseline: str | None,
    batch_size: int,
) -> None:
    check_arm_names(list(arms))
    if not prompts:
        raise UserError("the list of prompts is empty: give at least one prompt")
    if len(seeds) != len(prompts) or (scenes is not None and len(scenes) != len(prompts)):
        counts = f"{len(prompts)} prompts, {len(seeds)} seeds, {len(scenes) if scenes is not None else 'no'} scenes"
        raise UserError(f"every prompt needs its own seed and scene, got {counts}")
    if baseline is not None and baseline not in arms:
        raise UserError(f"unknown baseline arm {baseline!r}; the arms are {', '.join(arms)}")
    if batch_size < 1:
        raise UserError(f"the batch size must be at least 1, got {batch_size}")


def _make(name: str, arm: Arm, records: Sequence[Record], store: Store, batch_size: int, progress: Any) -> None:
    """Make the pictures of an arm that are not on disk yet."""
    pending = [r.index for r in records if not store.finished(name, r.index, r.seed, r.prompt, arm.settings)]
    bar = progress.add_task(f"making {name}", total=len(records), completed=len(records) - len(pending))
    for batch in chunks(pending, batch_size):
        output = arm.generate([records[i].prompt for i in batch], [records[i].seed for i in batch])
        check_output(name, output, len(batch))
        costs = {
            "seconds": {stage: value / len(batch) for stage, value in output.seconds.items()},
            "peak_bytes": dict(output.peak_bytes),
            "batch_size": len(batch),
        }
        for position, index in enumerate(batch):
            record = records[index]
            draft = output.drafts[position] if output.drafts is not None else None
            store.keep(name, index, record.seed, record.prompt, output.images[position], draft, arm.settings, costs)
        progress.advance(bar, len(batch))


def _measure(
    name: str,
    records: Sequence[Record],
    metrics: Mapping[str, Metric],
    store: Store,
    batch_size: int,
    reference: Reference | None,
    progress: Any,
) -> None:
    """Show every metric the pictures of an arm, batch by batch."""
    bar = progress.add_task(f"measuring {name}", total=len(records))
    for batch in chunks(range(len(records)), batch_size):
        loaded = [(index, load_picture(store.picture(name, index, records[index].seed))) for index in batch]
        for shape, group in groupby(loaded, key=lambda item: item[1].shape):
            members = list(group)
            images = torch.stack([image for _, image in members])
            known = [_complete(records[index], name, store, reference, shape) for index, _ in members]
            for metric in metrics.values():
                metric.update(name, images, [record.prompt for record in known], known)
        progress.advance(bar, len(batch))


def _complete(record: Record, arm: str, store: Store, reference: Reference | None, shape: torch.Size) -> Record:
    """The record with the arm's draft, the true picture at the size `[3, H, W]`, and both files."""
    height, width = shape[-2:]
    true, true_path = None, None
    if reference is not None:
        true, true_path = store.reference(record, height, width, reference)
    return replace(
        record,
        reference=true,
        reference_path=true_path,
        draft=store.load_draft(arm, record.index, record.seed),
        path=store.picture(arm, record.index, record.seed),
    )


def _render(records: Sequence[Record], height: int, width: int) -> Tensor:
    from scale_dit.data.scenes import render

    return render([record.scene for record in records], height, width)


def _rows_of(name: str, records: Sequence[Record], metrics: Mapping[str, Metric], store: Store) -> list[Row]:
    rows = []
    for key, metric in metrics.items():
        try:
            rows += [Row.of(name, figure, value) for figure, value in metric.compute(name).items()]
        except (ValueError, RuntimeError, ArithmeticError) as error:
            # Hours of pictures are not thrown away because one metric's arithmetic failed on them.
            log.exception("%s could not be computed for %s", key, name)
            rows.append(Row(name, key, None, note=f"failed: {error}"))
    provenances = [read_provenance(store.picture(name, record.index, record.seed)) or {} for record in records]
    return rows + cost_rows(name, provenances)


def _differences(arms: Mapping[str, Arm], metrics: Mapping[str, Metric], baseline: str | None) -> list[Row]:
    """Paired differences of every arm minus the baseline, for what is measured picture by picture."""
    rows: list[Row] = []
    if baseline is None:
        return rows
    for name in [name for name in arms if name != baseline]:
        for metric in metrics.values():
            theirs = metric.per_picture(baseline)
            for figure, ours in metric.per_picture(name).items():
                difference = paired_difference(ours, theirs.get(figure, {}))
                if difference is not None:
                    mean, low, high, n = difference
                    note = "paired difference, bootstrap over pictures"
                    rows.append(Row(f"{name} - {baseline}", figure, mean, low, high, n, "", note))
    return rows


def _grid(arms: Mapping[str, Arm], records: Sequence[Record], store: Store, with_reference: bool) -> Path | None:
    if not records:
        return None
    columns = [*arms, "truth"] if with_reference else list(arms)
    rows = []
    for record in records:
        files: list[Path | None] = [store.picture(name, record.index, record.seed) for name in arms]
        rows.append([*files, store.any_reference(record)] if with_reference else files)
    path = store.folder / "pictures.png"
    prompts = [record.prompt for record in records]
    write_picture_grid(path, rows, columns, prompts)
    write_picture_grid(store.folder / "crops.png", rows, columns, prompts, crop=True)
    return path


def _information(arms: Mapping[str, Arm], records: Sequence[Record]) -> dict[str, Any]:
    return {
        "command": running_command(),
        "machine": machine(),
        "versions": versions_line(),
        "commit": commit(),
        "settings": {name: dict(arm.settings or {}) for name, arm in arms.items()},
        "prompts": [record.prompt for record in records],
        "seeds": [record.seed for record in records],
    }


def _progress(show: bool) -> AbstractContextManager[Any]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        disable=not show,
    )
