"""What bad input and bad luck get: one clear error, before minutes are spent, and whole files."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import hydra
import pytest
import safetensors.torch
import torch
from hydra.errors import InstantiationException
from training_runs import ROOT, command_environment, overrides, training_config

from scale_dit.entry import find_user_error
from scale_dit.errors import UserError
from scale_dit.messages import print_error
from scale_dit.run_folder import FINISHED, LAST
from scale_dit.sweeps import check_sweep_devices, device_count
from scale_dit.training import find_disk_error, train

NO_WEIGHTS = "/no/weights/here"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("window.size=0", r"[Ww]indow.*0"),
        ("window.size=3", r"[Ww]indow.*3.*multiple"),
        ("window.size=64", r"[Ww]indow.*64"),
        ("order.name=spiral", r"spiral.*hilbert.*raster.*window"),
        ("anchors.name=left", r"left.*(scaled|centred)"),
        ("pattern.scope=near", r"near.*aligned.*global"),
        ("pattern.guidance_reach=far", r"far.*adjacent"),
        ("scale=0.5", r"0\.5"),
        ("lora.rank=0", r"rank is 0"),
        ("lora.scope=some", r"some.*guidance, all"),
        ("attention.name=fast", r"fast.*sdpa"),
        ("model.optimiser=sgd", r"sgd.*adamw, prodigy"),
        ("model.dtype=int8", r"int8.*float32"),
        ("model.caption_dropout=2", r"caption_dropout is 2"),
        ("base.training_shift=0", r"base\.training_shift is 0"),
        ("base.training_spread=-1", r"base\.training_spread is -1"),
        ("base.guidance_scale=-1", r"base\.guidance_scale is -1"),
        ("base.refine_guidance_scale=", r"base\.refine_guidance_scale is ''.*number"),
        ("base.family=scale_dit.models.none.None", r"cannot be imported"),
        ("model.initial_lora=nowhere", r"nowhere.*does not exist"),
        ("ckpt_path=nowhere.ckpt", r"nowhere\.ckpt does not exist"),
        ("resume=nowhere", r"no run folder nowhere"),
        ("callbacks.ema.decay=1", r"decay is 1"),
        ("callbacks.checkpoint.every_n_steps=0", r"every_n_steps is 0"),
        ("seed=0", r"weights of base 'small'.*/no/weights/here.*base=tiny"),
    ],
)
def test_what_cannot_be_is_said_before_weights_are_loaded(override: str, message: str, tmp_path: Path) -> None:
    """There are no weights at the base's path: whatever gets as far as loading them gives another error."""
    with pytest.raises((UserError, InstantiationException)) as raised:
        train(training_config(Path(NO_WEIGHTS), tmp_path, override))
    error = find_user_error(raised.value)
    assert error is not None, raised.value
    assert re.search(message, str(error), re.DOTALL), str(error)


def test_a_loss_that_is_not_finite_stops_before_the_weights(small_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"loss is (nan|inf) in step 2;.*state, after step 1.*lower model.learning_rate"
    ):
        train(
            training_config(
                small_folder,
                tmp_path,
                "model.learning_rate=1e30",
                "model.warmup=1",
                "callbacks.checkpoint.every_n_steps=1",
            )
        )
    checkpoint = torch.load(tmp_path / LAST)
    assert checkpoint["global_step"] == 1
    assert all(bool(value.isfinite().all()) for value in checkpoint["state_dict"].values())
    assert not (tmp_path / FINISHED).exists()
    assert not (tmp_path / "lora").exists()


def test_a_loss_that_is_not_finite_stops_an_accumulated_step(small_folder: Path, tmp_path: Path) -> None:
    options = ("trainer.accumulate_grad_batches=2", "model.learning_rate=1e30", "model.warmup=1")
    with pytest.raises(UserError, match=r"loss is (nan|inf) in step 2;"):
        train(training_config(small_folder, tmp_path, *options))


def test_weights_that_are_not_finite_never_replace_the_last_good_ones(small_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no longer finite after step 2; the last good state, after step 1"):
        train(
            training_config(
                small_folder,
                tmp_path,
                "callbacks.checkpoint.every_n_steps=1",
                "+callbacks.spoil={_target_:training_runs.SpoilWeights,step:2}",
            )
        )
    checkpoint = torch.load(tmp_path / LAST)
    assert checkpoint["global_step"] == 1
    assert all(bool(value.isfinite().all()) for value in checkpoint["state_dict"].values())


@pytest.fixture
def file_size_limit() -> Iterator[None]:
    """Whatever limit a test sets ends with it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("file_size_limit")
@pytest.mark.parametrize(("step", "left"), [(0, "no checkpoint was written yet"), (2, r"\(step 2\) is whole.*resume=")])
def test_a_full_disk(step: int, left: str, small_folder: Path, tmp_path: Path) -> None:
    limit = f"+callbacks.limit={{_target_:training_runs.LimitFileSize,step:{step},size:20000}}"
    options = ("callbacks.checkpoint.every_n_steps=1", "trainer.max_steps=4")
    with pytest.raises(UserError, match=rf"cannot write into {tmp_path}.*File too large.*{left}"):
        train(training_config(small_folder, tmp_path, limit, *options))
    assert not (tmp_path / FINISHED).exists()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == (["last.ckpt"] if step else [])
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    if step:
        assert torch.load(tmp_path / LAST)["global_step"] == step
        train(training_config(small_folder, tmp_path, *options, f"resume={tmp_path}"))
        assert torch.load(tmp_path / LAST)["global_step"] == 4


@pytest.mark.usefixtures("file_size_limit")
def test_a_full_disk_is_recognised_through_safetensors(tmp_path: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    with pytest.raises(safetensors.SafetensorError) as raised:
        safetensors.torch.save_file({"a": torch.zeros(10_000)}, tmp_path / "a.safetensors")
    assert find_disk_error(raised.value) == "File too large"
    assert find_disk_error(ValueError("another error")) is None


@pytest.mark.parametrize(
    "trainer",
    [
        {"devices": 2, "accelerator": "cpu"},
        {"devices": "2", "accelerator": "gpu", "strategy": "ddp"},
        {"devices": [0, 1], "accelerator": "gpu"},
        {"devices": "0,1", "accelerator": "gpu"},
        {"devices": 1, "num_nodes": 2},
    ],
)
def test_sweeps_over_several_devices_are_refused(trainer: dict) -> None:
    with pytest.raises(UserError, match=r"--multirun.*one device.*trainer\.devices=1"):
        check_sweep_devices(trainer)


@pytest.mark.parametrize("devices", [1, "1", [0]])
def test_sweeps_on_one_device_are_allowed(devices: object) -> None:
    check_sweep_devices({"devices": devices, "accelerator": "auto"})
    assert device_count("auto", "cpu") == 1


def test_the_error_behind_wrappers_is_found() -> None:
    config = {"_target_": "scale_dit.method.Method", "scale": {"_target_": "scale_dit.lora.LoraSettings", "rank": 0}}
    with pytest.raises(InstantiationException) as raised:
        hydra.utils.instantiate(config)
    assert str(find_user_error(raised.value)).startswith("LoRA rank is 0")
    assert find_user_error(ValueError("no user error")) is None


def test_brackets_in_a_message_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    print_error(UserError("keys ['a'] [bold]b[/bold]"))
    assert capsys.readouterr().err == "error: keys ['a'] [bold]b[/bold]\n"


@pytest.mark.slow
def test_one_message_and_status_two_in_a_shell(tmp_path: Path) -> None:
    command = [sys.executable, "src/train.py", *overrides(Path(NO_WEIGHTS), "window.size=0")]
    answer = subprocess.run(
        [*command, f"hydra.run.dir={tmp_path}/run"], cwd=ROOT, env=command_environment(), capture_output=True, text=True
    )
    assert answer.returncode == 2
    assert answer.stderr.startswith("error: ")
    assert answer.stderr.count("\n") == 1, answer.stderr
