"""Figures quoted in documents: finding them, checking them against the table, rewriting them.

A document quotes a figure between two comments that a reader does not see:

    VAE PSNR <!-- figure:tiny_vae_psnr_db -->28.9<!-- /figure --> dB

The number keeps the decimals it is quoted with. A Python format may follow the name (`figure:count .1%`), and
`name.low`, `name.high`, `name.n`, `name.machine`, `name.date` quote the other columns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from scale_dit.evaluation.figures import FigureRow
from scale_dit.provenance import project_root

QUOTE = re.compile(r"(<!--\s*figure:(?P<name>[\w.]+)(?:\s+(?P<format>\S+))?\s*-->)(?P<text>.*?)(<!--\s*/figure\s*-->)")
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.(?P<decimals>\d+))?\Z")


@dataclass(frozen=True)
class Quote:
    """One quoted figure: where it stands, what it says, and what it should say (None: there is no such row)."""

    path: Path
    line: int
    name: str
    text: str
    expected: str | None


def documents(root: Path | None = None) -> list[Path]:
    """The documents that may quote figures: README and docs/, and the experiments' and assets' own pages."""
    root = root or project_root()
    patterns = ("README.md", "docs/**/*.md", "experiments/**/*.md", "assets/**/*.md")
    return [path for pattern in patterns for path in sorted(root.glob(pattern))]


def quotes(path: Path, rows: Mapping[str, FigureRow]) -> list[Quote]:
    """Every quote in a document."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        for match in QUOTE.finditer(line):
            expected = _expected(match, rows)
            found.append(Quote(path, number, match["name"], match["text"], expected))
    return found


def update_document(path: Path, rows: Mapping[str, FigureRow]) -> int:
    """Rewrite the quotes whose rows say something else; returns how many changed."""
    changed = 0

    def rewrite(match: re.Match[str]) -> str:
        nonlocal changed
        expected = _expected(match, rows)
        if expected is None or expected == match["text"]:
            return match[0]
        changed += 1
        return f"{match[1]}{expected}{match[5]}"

    before = path.read_text(encoding="utf-8")
    after = QUOTE.sub(rewrite, before)
    if changed:
        path.write_text(after, encoding="utf-8")
    return changed


def _expected(match: re.Match[str], rows: Mapping[str, FigureRow]) -> str | None:
    name, _, column = match["name"].partition(".")
    row = rows.get(name)
    value = getattr(row, column or "value", None) if row else None
    if value is None:
        return None
    if isinstance(value, str):
        return value
    if match["format"]:
        return format(value, match["format"])
    number = NUMBER.match(match["text"].strip())
    decimals = len(number["decimals"] or "") if number else None
    grouping = "," if number and "," in number[0] else ""
    return f"{value:{grouping}.{decimals}f}" if decimals is not None else f"{value:.4g}"
