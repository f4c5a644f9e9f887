from __future__ import annotations

import threading

import pytest

from scale_dit.errors import UserError
from scale_dit.evaluation import figures
from scale_dit.evaluation.figures import COLUMNS, read_figures, record_figure
from scale_dit.evaluation.quotes import documents, quotes, update_document


def test_a_figure_measured_anew_replaces_its_row(tmp_path):
    path = tmp_path / "experiments" / "figures.csv"
    record_figure("b_share", 0.5, "share", low=0.4, high=0.6, n=20, command="measure b", path=path)
    record_figure("a_minutes", 3, "minutes", command="measure a", path=path)
    record_figure("b_share", 0.123456789, "share", command="measure b", path=path)
    lines = path.read_text().splitlines()
    assert lines[0] == ",".join(COLUMNS)
    assert [line.split(",")[0] for line in lines[1:]] == ["a_minutes", "b_share"]
    row = read_figures(path)["b_share"]
    assert (row.value, row.low, row.n, row.command) == (0.123457, None, None, "measure b")
    assert "torch" in row.versions
    assert row.machine
    assert len(row.date) == 10
    assert [file.name for file in path.parent.iterdir()] == ["figures.csv"]


def test_writers_at_the_same_time_lose_nothing(tmp_path):
    path = tmp_path / "figures.csv"
    threads = [
        threading.Thread(target=record_figure, args=(f"figure_{i}", i, "pieces"), kwargs={"path": path})
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_figures(path)) == 8


def test_bad_figures_are_refused(tmp_path):
    path = tmp_path / "figures.csv"
    with pytest.raises(UserError, match="'Count 1024'"):
        record_figure("Count 1024", 1, "share", path=path)
    with pytest.raises(UserError, match="finite"):
        record_figure("count", float("nan"), "share", path=path)
    path.write_text("name,value\n")
    with pytest.raises(UserError, match="columns"):
        read_figures(path)


DOCUMENT = """PSNR <!-- figure:psnr_db -->27.1<!-- /figure --> dB, count <!-- figure:count .0% -->91%<!-- /figure -->
| steps | <!-- figure:steps -->1,000<!-- /figure --> | n = <!-- figure:count.n -->3<!-- /figure --> |
<!-- figure:unknown -->5<!-- /figure -->
"""


def test_quotes_are_checked_and_rewritten(tmp_path):
    path, table = tmp_path / "README.md", tmp_path / "figures.csv"
    path.write_text(DOCUMENT)
    record_figure("psnr_db", 28.94, "dB", path=table)
    record_figure("count", 0.91, "share", n=200, path=table)
    record_figure("steps", 12345, "steps", path=table)
    rows = read_figures(table)
    found = {quote.name: quote for quote in quotes(path, rows)}
    assert (found["psnr_db"].text, found["psnr_db"].expected) == ("27.1", "28.9")
    assert found["count"].expected == found["count"].text == "91%"
    assert found["steps"].expected == "12,345"
    assert found["count.n"].expected == "200"
    assert (found["unknown"].expected, found["unknown"].line) == (None, 3)
    assert update_document(path, rows) == 3
    assert [quote.name for quote in quotes(path, rows) if quote.text != quote.expected] == ["unknown"]
    assert update_document(path, rows) == 0


def test_the_command_checks_updates_and_merges(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, "project_root", lambda: tmp_path)
    monkeypatch.setattr("scale_dit.evaluation.quotes.project_root", lambda: tmp_path)
    (tmp_path / "README.md").write_text("<!-- figure:psnr_db -->1.0<!-- /figure -->\n")
    record_figure("psnr_db", 28.94, "dB", path=tmp_path / "elsewhere.csv")
    assert documents() == [tmp_path / "README.md"]
    assert figures.main(["--merge", str(tmp_path / "elsewhere.csv"), "--check"]) == 1
    assert "README.md:1: psnr_db is quoted as '1.0'" in capsys.readouterr().out
    assert figures.main(["--update-docs"]) == 0
    assert "28.9" in (tmp_path / "README.md").read_text()
    assert figures.main([]) == 0
    assert "psnr_db" in capsys.readouterr().out
