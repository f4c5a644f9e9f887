"""The memory study puts measured rows into its page and the figures, and its base is planned as a folder's is."""

from __future__ import annotations

import csv
import shutil
import sys
from pathlib import Path

import pytest
import torch
from full_size import STUDY, flux1_dev, study

from scale_dit.errors import UserError
from scale_dit.evaluation.figures import read_figures
from scale_dit.evaluation.quotes import quotes
from scale_dit.models.random_weights import base_settings, on_meta, write_configs
from scale_dit.models.shapes import shape_of
from scale_dit.planning.components import Components, size_of
from scale_dit.planning.trace import trace

WHERE = {"command": "measure", "machine": "a card", "versions": "torch 1", "date": "2026-01-02", "commit": "abc"}


def write(path: Path, rows: list[dict[str, object]]) -> None:
    rows = [WHERE | row for row in rows]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def report(tmp_path, monkeypatch):
    """The study's report in a folder of its own, with figures of its own and rows that are invented."""
    module = study("run")
    shutil.copy(STUDY / "README.md", tmp_path)
    monkeypatch.setattr(module, "HERE", tmp_path)
    monkeypatch.setattr(module, "figures_file", lambda: tmp_path / "figures.csv")
    monkeypatch.setattr(sys, "argv", ["run.py", "--tables", str(tmp_path)])
    kinds = {
        "stock_eager": (7, 30), "stock_compiled": (6, 28), "windowed_eager": (2, 31),
        "windowed_parts": (2, 27), "windowed_low_memory": (2.5, 25), "windowed_compiled": (1.8, 29),
        "windowed_low_memory_compiled": (2.4, 21),
    }  # fmt: skip
    for table in ("steps.csv", study("measure").steps_table("klein_9b")):
        rows = [{"px": 4096, "kind": k, "seconds": s, "peak_gb": p} for k, (s, p) in kinds.items()]
        older = {"px": 4096, "kind": "windowed_compiled", "seconds": 0.6, "peak_gb": 1, "command": "another"}
        write(tmp_path / table, [older, *rows])
    write(
        tmp_path / "pictures.csv",
        [
            {
                "base": base, "px": px, "cap_gb": "", "way": "memory.offload=none",
                "steps": steps, "stage": stage, "seconds": 7,
                "planned_seconds": 7.7, "peak_gb": 40, "planned_peak_gb": 38,
            }
            for base, px, steps in (("flux1_dev", 4096, 28), ("flux1_dev", 8192, 7), ("klein_9b", 4096, 4))
            for stage in ("text", "draft", "refine", "decode")
        ],
    )  # fmt: skip
    write(
        tmp_path / "least.csv",
        [{
            "base": "flux1_dev", "px": 2048, "way": "",
            "least_cap_gb": 4, "peak_gb": 3.5, "planned_peak_gb": 3.4, "text_peak_gb": 9.8,
            "refine_seconds_a_step": 1,
        }],
    )  # fmt: skip
    return module


def test_rows_become_figures_and_tables(report, tmp_path):
    report.main()
    rows = read_figures(tmp_path / "figures.csv")
    values = {name: row.value for name, row in rows.items()}
    assert values["step_4k_over_dense"] == pytest.approx(0.3), "of one command"
    assert values["refine_4k_memory_over_dense"] == pytest.approx(0.9)
    assert values["refine_4k_memory_over_dense_compiled"] == pytest.approx(0.75)
    assert values["picture_4k_seconds_refine"] == 7
    assert "picture_8k_seconds_refine" not in values, "of 7 steps of 28"
    assert values["plan_error_seconds"] == pytest.approx(0.1)
    assert values["plan_error_memory"] == pytest.approx(0.05)
    assert values["min_gpu_gb_2k"] == 9.8, "prompts have to be encoded, too"
    found = quotes(tmp_path / "README.md", rows)
    assert len(found) == len(rows)
    assert all(quote.text == quote.expected for quote in found)
    readme = (tmp_path / "README.md").read_text()
    assert "| flux1_dev | 4096 | 7 | 196 | 7 | 0.036 |" in readme, "28 dense steps of 7 s"
    assert "| klein_9b | 4096 | 7 | 28 | 7 | 0.250 |" in readme
    assert "Not measured yet." not in readme


def test_rows_of_two_machines_are_refused(report, tmp_path):
    row = {"px": 4096, "kind": "stock_eager", "seconds": 7, "peak_gb": 30}
    write(tmp_path / "steps.csv", [row, row | {"machine": "another card"}])
    with pytest.raises(UserError, match="differ in machine"):
        report.main()


def test_without_tables_it_says_how_to_make_them(report, tmp_path):
    for table in tmp_path.glob("*.csv"):
        table.unlink()
    with pytest.raises(UserError, match=r"measure\.py"):
        report.main()


def test_a_folder_of_configs_is_enough_for_a_plan(tmp_path):
    settings = write_configs("flux1_dev", tmp_path)
    read, built = Components.of(settings, torch.bfloat16), flux1_dev()
    assert {name: size_of(part) for name, part in read.modules.items()} == {
        name: size_of(part) for name, part in built.modules.items()
    }


@pytest.mark.parametrize("base", ["flux1_dev", "klein_9b"])
def test_steps_of_both_kinds_are_what_is_compared(base, monkeypatch):
    """On `meta`, of few blocks: the stock step attends densely, ours by windows, and holds less."""
    measure = study("measure")
    monkeypatch.setattr(measure, "DEVICE", torch.device("meta"))
    blocks = on_meta(shape_of(base, "full"), num_layers=1, num_single_layers=1)["transformer"]
    driver = Components({"transformer": blocks.to(torch.bfloat16)}).driver(base_settings(base), "triton")
    px = measure.Side.of("2048x4096")
    assert (px.height, px.width) == (4096, 2048)
    stock = trace(measure._stock_step(driver, px))
    ours = trace(measure._windowed_step(driver, px, "windowed_parts"))
    assert stock.flops("attention") > 10 * ours.flops("windowed") > 0
    assert ours.flops("attention") == stock.flops("windowed") == 0
    assert ours.peak < stock.peak
