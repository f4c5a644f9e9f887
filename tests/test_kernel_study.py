"""The kernel study puts measured rows into its page and the figures, and refuses rows that must not be compared."""

from __future__ import annotations

import csv
import importlib.util
import shutil
import sys
from itertools import product
from pathlib import Path

import pytest

from scale_dit.errors import UserError
from scale_dit.evaluation.figures import read_figures
from scale_dit.evaluation.quotes import quotes

STUDY = Path(__file__).resolve().parents[1] / "experiments" / "kernel"
WHERE = {"command": "benchmark", "machine": "a card", "versions": "torch 1", "date": "2026-01-02", "commit": "abc"}
MS = {"triton": 2.0, "flex_joined": 4.0, "flex_alone": 5.0, "fa4_joined": 2.5, "fa4_alone": 3.2, "dense_cudnn": 80.0}


def attention_rows() -> list[dict[str, str]]:
    """Invented: time grows with the picture's area, and threefold with gradients."""
    rows = []
    for px, pattern, backend, kind in product(
        (4096, 8192), ("disjoint", "official"), MS, ("forward", "forward_backward")
    ):
        orders = ("window", "raster", "hilbert") if backend == "triton" and px == 4096 else ("window",)
        for order in orders:
            ms = MS[backend] * (px / 4096) ** 2 * (3 if kind == "forward_backward" else 1)
            times = {"p20_ms": ms * 0.9, "p50_ms": ms, "p80_ms": ms * 1.1, "host_ms": 0.1}
            measures = dict.fromkeys(("share_of_gemm", "roofline_ms", "flop_per_byte", "output_error"), "0.5")
            keys = {"px": px, "pattern": pattern, "order": order, "backend": backend, "pass": kind}
            rest = {"tflops": "600", "extra_mib": "12.5", "gradient_error": "", "settings": "", "rounds": "20"}
            rows.append({key: str(value) for key, value in (keys | times | measures | rest | WHERE).items()})
    return rows


def write(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def study(tmp_path, monkeypatch):
    """The study in a folder of its own, with figures of its own and tables that are invented."""
    spec = importlib.util.spec_from_file_location("kernel_study", STUDY / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shutil.copy(STUDY / "README.md", tmp_path)
    monkeypatch.setattr(module, "HERE", tmp_path)
    monkeypatch.setattr(module, "figures_file", lambda: tmp_path / "figures.csv")
    arguments = ["run.py", "--attention", str(tmp_path / "attention.csv"), "--rotation", str(tmp_path / "rotation.csv")]
    arguments += ["--wide", str(tmp_path / "wide.csv")]
    monkeypatch.setattr(sys, "argv", arguments)
    rotation = {"px": "4096", "implementation": "fused", "pass": "forward", "p50_ms": "0.1", "gb_per_s": "2000"}
    write(tmp_path / "rotation.csv", [rotation | WHERE])
    wide = {"px": "8192", "implementation": "weighed", "p50_ms": "300.5", "tflops": "240", "picture_s": "9.6"}
    write(tmp_path / "wide.csv", [wide | WHERE])
    write(tmp_path / "attention.csv", attention_rows())
    return module


def test_rows_become_figures_quotes_tables_and_plots(study, tmp_path):
    study.main()
    rows = read_figures(tmp_path / "figures.csv")
    assert {name: row.value for name, row in rows.items()} == {
        "kernel_fwd_4k_ms": 2.0,
        "kernel_fwd_4k_tflops": 600,
        "kernel_fwd_4k_vs_fa4": 0.625,
        "kernel_fwd_4k_vs_fa4_joined": 0.8,
        "kernel_fwd_4k_vs_flex": 0.4,
        "kernel_fwd_4k_vs_flex_joined": 0.5,
        "kernel_fwd_8k_over_4k": 4.0,
        "kernel_fwdbwd_4k_ms": 6.0,
        "kernel_fwdbwd_4k_vs_flex": 0.4,
        "kernel_fwdbwd_4k_vs_flex_joined": 0.5,
        "kernel_fwd_4k_speedup_vs_dense_cudnn": 40.0,
        "kernel_fwd_4k_extra_mib": 12.5,
    }
    assert (rows["kernel_fwd_4k_ms"].low, rows["kernel_fwd_4k_ms"].high) == (1.8, 2.2)
    assert rows["kernel_fwd_4k_ms"].commit == "abc"
    found = quotes(tmp_path / "README.md", rows)
    assert {quote.name for quote in found} == set(rows)
    assert all(quote.text == quote.expected for quote in found)
    page = (tmp_path / "README.md").read_text()
    assert "| disjoint | forward | triton | 2 (600) | 8 (600) |" in page
    assert "| 4096 | disjoint | raster | 28,672 | 24,576 | 2.0 | 0.070 |" in page
    assert "| 8192 | weighed | 300.5 | 240 | 9.6 |" in page
    assert "Not measured" not in page
    assert all((tmp_path / name).is_file() for name in ("times.png", "orders.png"))
    study.main()  # once more changes nothing
    assert (tmp_path / "README.md").read_text() == page


def test_what_was_not_measured_is_no_figure(study, tmp_path, capsys):
    write(tmp_path / "attention.csv", [row for row in attention_rows() if row["backend"] != "fa4_alone"])
    study.main()
    assert "kernel_fwd_4k_vs_fa4: not measured" in capsys.readouterr().out
    assert "kernel_fwd_4k_vs_fa4" not in read_figures(tmp_path / "figures.csv")
    assert "kernel_fwd_4k_vs_fa4 " not in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(("column", "value"), [("machine", "another"), ("date", "2026-01-03"), ("commit", "def")])
def test_rows_of_different_places_are_refused(study, tmp_path, column, value):
    rows = attention_rows()
    rows[-1][column] = value
    write(tmp_path / "attention.csv", rows)
    with pytest.raises(UserError, match=rf"differ in {column} \(.*{value}.*measure all anew"):
        study.main()
    assert not (tmp_path / "figures.csv").exists()


def test_a_ratio_is_of_one_run(study, tmp_path):
    rows = attention_rows()
    for row in rows:
        if row["px"] == "8192":
            row["command"] = "another run"
    write(tmp_path / "attention.csv", rows)
    with pytest.raises(UserError, match="kernel_fwd_8k_over_4k differ in command"):
        study.main()


def test_two_rows_of_one_case_are_refused(study, tmp_path):
    rows = attention_rows()
    write(tmp_path / "attention.csv", [*rows, rows[0] | {"command": "another run"}])
    with pytest.raises(UserError, match="two rows measured 4096, disjoint, window, triton, forward: delete the older"):
        study.main()


def test_a_missing_table_says_what_writes_it(study, tmp_path):
    (tmp_path / "attention.csv").unlink()
    with pytest.raises(UserError, match=r"python src/benchmark.py kernel=attention"):
        study.main()
