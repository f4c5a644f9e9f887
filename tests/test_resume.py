"""A run that was interrupted and resumed equals one that was not, to the bit."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from commands import Started, run, start
from training_runs import overrides, training_config

from scale_dit.errors import Interrupted, UserError
from scale_dit.loggers import MetricsFile
from scale_dit.lora import FILE_NAME
from scale_dit.resuming import resume_training
from scale_dit.run_folder import (
    FINISHED,
    LAST,
    check_new,
    check_resumable,
    resume_argument,
    write_json,
)
from scale_dit.training import train

STEPS = 6
INTERRUPT = "+callbacks.signal={_target_:training_runs.SignalAt,step:3}"


def same_values(left: object, right: object) -> bool:
    """Whether two nested containers of plain values and tensors are equal to the bit."""
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return (
            isinstance(right, dict)
            and left.keys() == right.keys()
            and all(same_values(left[k], right[k]) for k in left)
        )
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same_values, left, right))  # type: ignore[arg-type]
    return left == right


def lora_file(folder: Path) -> tuple[dict, bytes]:
    """Header and tensors of a run's LoRA file, apart: safetensors writes the header's metadata in any order."""
    content = (folder / "lora" / FILE_NAME).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def learning_rows(folder: Path) -> list[dict[str, str]]:
    """What was logged that does not depend on the clock or the machine."""
    with (folder / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k.startswith(("step", "train/"))} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def uninterrupted(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of six steps."""
    folder = tmp_path_factory.mktemp("runs") / "uninterrupted"
    train(training_config(small_folder, folder, f"trainer.max_steps={STEPS}"))
    return folder


@pytest.mark.parametrize("optimiser", ["adamw", "prodigy"])
def test_resumed_equals_uninterrupted(optimiser: str, uninterrupted: Path, small_folder: Path, tmp_path: Path) -> None:
    options = (f"trainer.max_steps={STEPS}", f"model.optimiser={optimiser}")
    if optimiser == "adamw":
        whole = uninterrupted
    else:
        whole = tmp_path / "whole"
        train(training_config(small_folder, whole, *options))
    parts = tmp_path / "parts"
    with pytest.raises(Interrupted, match=r"after step 3; .*last\.ckpt"):
        train(training_config(small_folder, parts, *options, INTERRUPT))
    assert not (parts / FINISHED).exists()
    assert torch.load(parts / LAST)["global_step"] == 3
    metrics, objects = train(training_config(small_folder, parts, *options, f"resume={parts}"))
    assert objects["trainer"].global_step == STEPS
    assert lora_file(parts) == lora_file(whole)
    first, second = torch.load(whole / LAST), torch.load(parts / LAST)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        assert same_values(first[part], second[part]), part
    assert same_values(*(each["callbacks"]["TrainableEMA"] for each in (first, second)))
    assert learning_rows(parts) == learning_rows(whole)
    assert [int(row["step"]) for row in learning_rows(parts)] == list(range(STEPS))
    assert json.loads((parts / "run.json").read_text())["resumed"][0]["step"] == 3
    assert json.loads((parts / FINISHED).read_text())["metrics"]["train/loss"] == metrics["train/loss"]


def test_the_runs_learn_something(uninterrupted: Path) -> None:
    """Otherwise equality of two runs would show nothing."""
    rows = learning_rows(uninterrupted)
    assert len({row["train/loss"] for row in rows}) == STEPS
    assert all(float(row["train/gradient_norm"]) > 0 for row in rows)


def test_steps_behind_the_checkpoint_are_taken_again(uninterrupted: Path, small_folder: Path, tmp_path: Path) -> None:
    """A run that was killed has logged steps that its last checkpoint does not know."""
    folder = tmp_path / "killed"
    options = (f"trainer.max_steps={STEPS}", "callbacks.checkpoint.every_n_steps=2")
    spoil = "+callbacks.spoil={_target_:training_runs.SpoilWeights,step:4}"
    with pytest.raises(UserError, match=r"no longer finite after step 4; the last good state, after step 2"):
        train(training_config(small_folder, folder, *options, spoil))
    train(training_config(small_folder, folder, *options, f"resume={folder}"))
    assert learning_rows(folder) == learning_rows(uninterrupted)
    assert lora_file(folder) == lora_file(uninterrupted)


def test_a_finished_run_is_refused(uninterrupted: Path, small_folder: Path) -> None:
    before = (uninterrupted / LAST).read_bytes()
    with pytest.raises(UserError, match=r"already finished"):
        train(training_config(small_folder, uninterrupted, f"resume={uninterrupted}"))
    with pytest.raises(UserError, match=r"already holds a finished run.*hydra\.run\.dir="):
        train(training_config(small_folder, uninterrupted))
    assert (uninterrupted / LAST).read_bytes() == before


def test_folders_that_cannot_be_resumed(uninterrupted: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run folder .*nowhere"):
        check_resumable(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no run\.json"):
        check_resumable(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot be read"):
        check_resumable(tmp_path)
    write_json(tmp_path / "run.json", {"overrides": []})
    with pytest.raises(UserError, match=r"no checkpoint .*start it again"):
        check_resumable(tmp_path)
    check_new(tmp_path)
    (tmp_path / LAST).parent.mkdir()
    (tmp_path / LAST).write_bytes((uninterrupted / LAST).read_bytes())
    assert check_resumable(tmp_path) == tmp_path / LAST
    with pytest.raises(UserError, match=r"unfinished run.*resume="):
        check_new(tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("model.learning_rate=5e-4", r"model\.learning_rate was 0\.001, now 0\.0005"),
        ("order=raster", r"method\.order was 'hilbert', now 'raster'"),
        ("lora.rank=8", r"lora\.rank was 16, now 8"),
        ("seed=1", r"seed was 0, now 1"),
        ("data.count=4", r"data\.count was 8, now 4"),
    ],
)
def test_resuming_with_other_settings(change: str, named: str, unfinished: Path, small_folder: Path) -> None:
    with pytest.raises(UserError, match=named):
        train(training_config(small_folder, unfinished, change, f"resume={unfinished}"))


@pytest.fixture(scope="module")
def unfinished(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was interrupted in its third step."""
    folder = tmp_path_factory.mktemp("runs") / "unfinished"
    with pytest.raises(Interrupted):
        train(training_config(small_folder, folder, INTERRUPT))
    return folder


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("base.name=other", r"trained with base 'small', but now base is 'other'"),
        ("lora.rank=8", r"trained with rank 16, but now rank is 8.*lora\.rank=16"),
    ],
)
def test_a_checkpoint_of_another_base_or_rank(
    change: str, named: str, unfinished: Path, small_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=named):
        train(training_config(small_folder, tmp_path / "new", f"ckpt_path={unfinished / LAST}", change))


def test_checkpoints_that_cannot_be_read(unfinished: Path, small_folder: Path, tmp_path: Path) -> None:
    whole = (unfinished / LAST).read_bytes()
    for name, content, named in (
        ("truncated", whole[: len(whole) // 2], "truncated"),
        ("text", b"no checkpoint", "truncated or no checkpoint"),
        ("empty", b"", "truncated"),
    ):
        path = tmp_path / f"{name}.ckpt"
        path.write_bytes(content)
        with pytest.raises(UserError, match=named):
            train(training_config(small_folder, tmp_path / name, f"ckpt_path={path}"))
    with pytest.raises(UserError, match="does not exist"):
        train(training_config(small_folder, tmp_path / "none", f"ckpt_path={tmp_path / 'none.ckpt'}"))


def test_resume_alone_repeats_the_runs_own_command_line(tmp_path: Path) -> None:
    folder = tmp_path / "a run, with = and 'quotes'"
    (folder / LAST).parent.mkdir(parents=True)
    (folder / LAST).touch()
    started = ["base=tiny", "experiment=scale_dit_4k", "trainer.max_steps=20", "+tag=[a,b]"]
    write_json(folder / "run.json", {"overrides": started})
    value = resume_argument(folder)
    quoted = subprocess.run(["sh", "-c", f"printf %s {value}"], capture_output=True, text=True, check=True).stdout
    arguments = resume_training([quoted, "trainer.max_steps=40", "--cfg", "job"])
    assert arguments[:2] == ["--cfg", "job"]
    assert arguments[2:6] == ["base=tiny", "experiment=scale_dit_4k", "trainer.max_steps=40", "+tag=[a,b]"]
    assert arguments[6].startswith("hydra.run.dir=")
    assert resume_training(arguments) == arguments
    assert resume_training(["base=tiny"]) == ["base=tiny"]
    assert resume_argument(Path("logs/x/2026-11-25_04")) == "resume=logs/x/2026-11-25_04"


def test_metrics_file_survives_a_cut_off_row_and_new_columns(tmp_path: Path) -> None:
    log = MetricsFile(tmp_path)
    log.log_metrics({"a": 1.0}, step=0)
    log.log_metrics({"a": 2.0, "b": 5.0}, step=1)
    with log.path.open("a") as file:
        file.write("2,3.")
    log = MetricsFile(tmp_path)
    log.log_metrics({"b": 6.0}, step=2)
    assert log.path.read_text() == "step,a,b\n0,1.0,\n1,2.0,5.0\n2,,6.0\n"
    log.forget_from(1)
    assert log.path.read_text() == "step,a,b\n0,1.0,\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_either_signal_lets_the_step_end(number: signal.Signals, small_folder: Path, tmp_path: Path) -> None:
    before = signal.getsignal(number)
    interrupt = f"+callbacks.signal={{_target_:training_runs.SignalAt,step:1,number:{int(number)}}}"
    with pytest.raises(Interrupted) as raised:
        train(training_config(small_folder, tmp_path, interrupt))
    assert raised.value.step == torch.load(tmp_path / LAST)["global_step"] == 1
    assert signal.getsignal(number) == before


def test_a_second_ctrl_c_stops_at_once(small_folder: Path, tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGINT)
    interrupt = "+callbacks.signal={_target_:training_runs.SignalAt,step:2,times:2}"
    try:
        with pytest.raises(SystemExit) as raised:
            train(training_config(small_folder, tmp_path, interrupt, "callbacks.checkpoint.every_n_steps=1"))
    finally:
        signal.signal(signal.SIGINT, handler)
    assert isinstance(raised.value.__context__, KeyboardInterrupt)
    assert torch.load(tmp_path / LAST)["global_step"] == 1


@pytest.mark.slow
def test_ctrl_c_in_a_shell_and_the_command_that_it_prints(small_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = overrides(small_folder, "trainer.max_steps=100000", f"hydra.run.dir={folder}")
    process = start("train.py", *options)
    wait_for(lambda: (folder / "metrics.csv").is_file(), process)
    process.send_signal(signal.SIGINT)
    status, _, message = process.wait(60)
    assert status == 130, message
    assert "Interrupted after step" in message
    assert "Traceback" not in message
    step = torch.load(folder / LAST)["global_step"]
    go_on = next(line.strip() for line in message.splitlines() if "resume=" in line)
    assert go_on == f"python src/train.py resume={folder}"
    second = run("train.py", *go_on.split()[2:], f"trainer.max_steps={step + 1}")
    assert second.returncode == 0, second.stderr
    assert torch.load(folder / LAST)["global_step"] == step + 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def wait_for(condition, process: Started, seconds: float = 120) -> None:
    """Wait until the condition holds, at most so long, and only while the process lives."""
    limit = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.wait()
        assert time.monotonic() < limit
        time.sleep(0.1)
