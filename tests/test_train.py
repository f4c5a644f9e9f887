"""Training through its entry point: what a run leaves behind, the debug configs, help, and sweeps."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import hydra
import pytest
import torch
from commands import run
from hydra import compose, initialize_config_dir
from safetensors import safe_open
from training_runs import ROOT, overrides, training_config

from scale_dit.lora import FILE_NAME, read_lora
from scale_dit.run_folder import FINISHED, LAST, RECORD
from scale_dit.sweeps import sweep_results, write_summary
from scale_dit.training import train

CONFIGS = ROOT / "configs"


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


@pytest.fixture(scope="module")
def run_folder(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of three steps."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    train(training_config(small_folder, folder, "trainer.max_steps=3"))
    return folder


def test_a_run_leaves_its_record(run_folder: Path) -> None:
    record = json.loads((run_folder / RECORD).read_text())
    assert record["seed"] == 0
    assert record["commit"]
    assert record["machine"]
    assert torch.__version__.startswith(record["versions"]["torch"])
    assert record["versions"].keys() >= {"python", "torch", "diffusers", "peft", "lightning"}
    assert record["config"]["trainer"]["max_steps"] == 3
    assert record["config"]["method"]["window"] is None
    assert "${" not in json.dumps(record["config"])
    finished = json.loads((run_folder / FINISHED).read_text())
    assert finished["steps"] == 3
    assert finished["metrics"]["train/loss"] > 0


def test_a_checkpoint_holds_the_lora_alone(run_folder: Path, small_folder: Path) -> None:
    checkpoint = torch.load(run_folder / LAST)
    assert all(".lora_" in name for name in checkpoint["state_dict"])
    base = sum(path.stat().st_size for path in (small_folder / "transformer").iterdir())
    trained = sum(tensor.nbytes for tensor in checkpoint["state_dict"].values())
    # Weights, their average and AdamW's two moments.
    assert 4 * trained < (run_folder / LAST).stat().st_size < 4 * trained + 200_000
    assert trained < base


def test_the_exported_lora_is_the_averaged_one(run_folder: Path) -> None:
    tensors, record = read_lora(run_folder / "lora")
    average = torch.load(run_folder / LAST)["callbacks"]["TrainableEMA"]["average"]
    assert record["base"] == "small"
    assert len(tensors) == len(average)
    for name, value in average.items():
        key = name.removeprefix("transformer.").replace(".scale_dit.", ".")
        assert torch.equal(tensors[key], value), name
    with safe_open(run_folder / "lora" / FILE_NAME, "pt") as file:
        assert file.metadata()["format"] == "pt"


@pytest.mark.parametrize("debug", names("debug"))
def test_debug_configs_run(debug: str, small_folder: Path, tmp_path: Path) -> None:
    options = [f"debug={debug}"]
    if debug == "limit":
        options = [*options, "callbacks.checkpoint.every_n_steps=2"]
    if debug == "overfit":
        options = [*options, "trainer.max_steps=12", "model.learning_rate=0.03"]
    _, objects = train(training_config(small_folder, tmp_path, *options))
    assert objects["trainer"].global_step == objects["cfg"].trainer.max_steps
    if debug == "overfit":
        with (tmp_path / "metrics.csv").open() as file:
            losses = [float(row["train/loss"]) for row in csv.DictReader(file)]
        assert losses[-1] < losses[0]
    if debug == "profiler":
        assert list(tmp_path.glob("fit-profile*.txt"))


@pytest.mark.parametrize("group", ["experiment", "debug", "sweep", "trainer", "logger", "callbacks", "data", "model"])
def test_every_choice_composes(group: str, tmp_path: Path) -> None:
    for name in names(group):
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            cfg = compose("train", overrides=[f"{group}={name}", f"paths.output_dir={tmp_path}"])
        assert hydra.utils.get_class(cfg.trainer._target_)
        for part in (cfg.model, cfg.data, *(each for each in (cfg.callbacks or {}).values() if each)):
            assert hydra.utils.get_object(part._target_)


def test_no_experiment_sets_what_belongs_to_the_base() -> None:
    for name in names("experiment"):
        text = (CONFIGS / "experiment" / f"{name}.yaml").read_text()
        assert not [key for key in ("window:", "cell:", "shift:", "text_length:") if key in text], name


@pytest.mark.slow
def test_help_and_config_are_useful() -> None:
    def output(*arguments: str) -> str:
        answer = run("train.py", *arguments)
        assert answer.returncode == 0, answer.stderr
        return answer.stdout

    text = output("--help")
    for expected in (
        "resume=",
        "klein_8k, scale_dit_4k, scale_dit_8k",
        "order: hilbert",
        "--multirun",
        "-sc install=bash",
    ):
        assert expected in text
    assert "scale_dit.lightning.ScaleDiTModule" in output("--cfg", "job", "experiment=scale_dit_4k", "base=tiny")


def test_summary_of_a_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, (order, loss, reason) in enumerate([("hilbert", 0.5, ""), ("raster", 0.25, ""), ("x", None, "no x")]):
        job = tmp_path / str(number)
        (job / ".hydra").mkdir(parents=True)
        (job / ".hydra" / "overrides.yaml").write_text(f"- base=tiny\n- order={order}\n")
        if reason:
            (job / "failed.txt").write_text(reason + "\n")
        else:
            (job / RECORD).write_text("{}")
            (job / FINISHED).write_text(json.dumps({"seconds": 2.5, "metrics": {"train/loss": loss}}))
    (tmp_path / "3" / ".hydra").mkdir(parents=True)
    (tmp_path / "3" / RECORD).write_text("{}")
    rows = sweep_results(tmp_path)
    assert [row["status"] for row in rows] == ["finished", "finished", "failed", "unfinished"]
    assert [row["order"] for row in rows] == ["hilbert", "raster", "x", ""]
    write_summary(rows, tmp_path / "summary.csv")
    with (tmp_path / "summary.csv").open() as file:
        assert [row["loss"] for row in csv.DictReader(file)] == ["0.5", "0.25", "", ""]
    table = capsys.readouterr().out
    assert table.index("raster") < table.index("hilbert") < table.index("no x")


@pytest.mark.slow
def test_a_sweep_runs_every_job_and_ends_with_a_table(small_folder: Path, tmp_path: Path) -> None:
    arguments = [*overrides(small_folder, "trainer.max_steps=2"), "window.size=2,4"]
    folders = "hydra.run.dir=unused", f"hydra.sweep.dir={tmp_path}"
    answer = run("train.py", "--multirun", *arguments, "order=hilbert,raster", *folders)
    assert answer.returncode == 0, answer.stderr
    with (tmp_path / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    assert len({(row["window.size"], row["order"]) for row in rows}) == 4
    assert all(row["status"] == "finished" and float(row["loss"]) > 0 for row in rows)
    assert str(tmp_path) in answer.stdout.replace("\n", "")


@pytest.mark.slow
def test_a_sweep_shows_jobs_that_failed(small_folder: Path, tmp_path: Path) -> None:
    arguments = [*overrides(small_folder, "trainer.max_steps=1"), "window.size=2,3", f"hydra.sweep.dir={tmp_path}"]
    answer = run("train.py", "--multirun", *arguments)
    assert answer.returncode == 1, answer.stderr
    assert "Traceback" not in answer.stderr
    assert [row["status"] for row in sweep_results(tmp_path)] == ["finished", "failed"]
    refused = run("train.py", "--multirun", *arguments, "trainer.devices=2", f"hydra.sweep.dir={tmp_path}/new")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: a sweep (--multirun) runs each job on one device")
    assert not os.path.exists(tmp_path / "new")
