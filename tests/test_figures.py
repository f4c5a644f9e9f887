"""Every figure that a document quotes equals its row in `experiments/figures.csv`."""

from __future__ import annotations

from scale_dit.evaluation.figures import read_figures
from scale_dit.evaluation.quotes import documents, quotes


def test_quoted_figures_equal_their_rows():
    rows = read_figures()
    wrong = [
        f"{quote.path.name}:{quote.line}: {quote.name} is quoted as {quote.text!r}, its row says {quote.expected!r}"
        for path in documents()
        for quote in quotes(path, rows)
        if quote.text != quote.expected
    ]
    assert not wrong, "\n".join([*wrong, "python -m scale_dit.evaluation.figures --update-docs rewrites them"])


def test_every_row_says_how_it_was_measured():
    for row in read_figures().values():
        assert row.command, row.name
        assert row.machine, row.name
        assert row.versions, row.name
        assert row.date, row.name
