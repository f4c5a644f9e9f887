"""The table of every figure that a document quotes, and the check that the documents quote it right.

    python -m scale_dit.evaluation.figures                  lists the rows
    python -m scale_dit.evaluation.figures --check          says which quoted numbers differ from their rows
    python -m scale_dit.evaluation.figures --update-docs    rewrites the quoted numbers
    python -m scale_dit.evaluation.figures --merge FILE     takes in rows that were measured on another machine

How a document quotes a figure is described in `quotes.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from scale_dit.errors import UserError
from scale_dit.files import csv_text, write_atomically
from scale_dit.provenance import commit, machine, project_root, running_command, versions_line

NAME = re.compile(r"[a-z0-9][a-z0-9_]*\Z")


@dataclass(frozen=True)
class FigureRow:
    """One row of the table; `low` and `high` are the 95 % interval or the 20th and 80th percentile."""

    name: str
    value: float
    unit: str
    low: float | None
    high: float | None
    n: int | None
    command: str
    machine: str
    versions: str
    commit: str
    date: str


COLUMNS = tuple(field.name for field in fields(FigureRow))


def figures_file() -> Path:
    """`experiments/figures.csv` of this checkout."""
    return project_root() / "experiments" / "figures.csv"


def record_figure(
    name: str,
    value: float,
    unit: str,
    low: float | None = None,
    high: float | None = None,
    n: int | None = None,
    command: str | None = None,
    path: Path | None = None,
) -> FigureRow:
    """Write one figure into the table, in place of an older row of that name.

    Args:
        name: lower case letters, digits and underscores.
        value: the number.
        unit: e.g. `dB`, `share`, `minutes`.
        low, high: 95 % interval, or 20th and 80th percentile of repeated timings.
        n: pictures, repetitions.
        command: what measured it; the running program by default.
        path: the table; `experiments/figures.csv` by default.

    Raises:
        UserError: the name is not of that form, or the value is not finite.
    """
    if not NAME.match(name):
        raise UserError(f"a figure's name is made of a-z, 0-9 and _, got {name!r}")
    if not abs(value) < float("inf"):
        raise UserError(f"figure {name} is {value}: only finite numbers are recorded")
    row = FigureRow(
        name=name,
        value=rounded(value),
        unit=unit,
        low=None if low is None else rounded(low),
        high=None if high is None else rounded(high),
        n=n,
        command=command or running_command(),
        machine=machine(),
        versions=versions_line(),
        commit=commit(),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )
    merge_rows([row], path or figures_file())
    return row


def read_figures(path: Path | None = None) -> dict[str, FigureRow]:
    """All rows by name; empty if there is no table yet.

    Raises:
        UserError: the file's columns are not those of the table.
    """
    path = path or figures_file()
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise UserError(f"{path} has the columns {reader.fieldnames}, expected {list(COLUMNS)}")
        return {entry["name"]: _parse(entry) for entry in reader}


def merge_rows(rows: Sequence[FigureRow], path: Path) -> None:
    """Put rows into the table, sorted by name, in one step that no reader and no second writer can see half done."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent):
        merged = {**read_figures(path), **{row.name: row for row in rows}}
        write_atomically(path, csv_text(COLUMNS, [asdict(merged[name]) for name in sorted(merged)]))


def _parse(entry: Mapping[str, str]) -> FigureRow:
    def number(text: str) -> float | None:
        return float(text) if text else None

    return FigureRow(
        **{key: entry[key] for key in ("name", "unit", "command", "machine", "versions", "commit", "date")},
        value=float(entry["value"]),
        low=number(entry["low"]),
        high=number(entry["high"]),
        n=int(entry["n"]) if entry["n"] else None,
    )


def rounded(value: float) -> float:
    """To the six digits that the table keeps."""
    return float(f"{float(value):.6g}")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold an advisory lock on a folder, where the system has such locks."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def main(arguments: Sequence[str] | None = None) -> int:
    """List, check, rewrite or merge figures; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m scale_dit.evaluation.figures", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="list quotes that differ from their rows")
    parser.add_argument("--update-docs", action="store_true", help="rewrite quoted numbers from the rows")
    parser.add_argument("--merge", type=Path, metavar="FILE", help="take in rows measured on another machine")
    options = parser.parse_args(arguments)
    from scale_dit.evaluation.quotes import documents, quotes, update_document

    if options.merge:
        taken = read_figures(options.merge)
        # A machine without a git checkout leaves the commit empty: it ran this working tree.
        complete = [FigureRow(**{**asdict(row), "commit": row.commit or commit()}) for row in taken.values()]
        merge_rows(complete, figures_file())
    rows = read_figures()
    if options.update_docs:
        for path in documents():
            print(f"{update_document(path, rows):3d} changed in {path.relative_to(project_root())}")
    found = [quote for path in documents() for quote in quotes(path, rows)]
    wrong = [quote for quote in found if quote.text != quote.expected]
    if options.check or options.update_docs:
        for quote in wrong:
            place = f"{quote.path.relative_to(project_root())}:{quote.line}"
            print(f"{place}: {quote.name} is quoted as {quote.text!r}, its row says {quote.expected!r}")
        print(f"{len(found)} figures quoted, {len(wrong)} wrong")
        return 1 if wrong else 0
    for row in rows.values():
        interval = f" [{row.low:g}, {row.high:g}]" if row.low is not None and row.high is not None else ""
        print(f"{row.name:40s} {row.value:g}{interval} {row.unit}  ({row.date}, {row.machine})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
