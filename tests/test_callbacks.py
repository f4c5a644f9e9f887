"""Callbacks: sample pictures that leave no trace, statistics against their own computation, averaging, loggers."""

from __future__ import annotations

import csv
import logging
import math
from pathlib import Path
from types import SimpleNamespace

import lightning
import pytest
import torch
from PIL import Image
from training_runs import training_config

from scale_dit.callbacks.ema import TrainableEMA, averaged_weights
from scale_dit.callbacks.progress import TrainingProgress
from scale_dit.callbacks.samples import SamplePictures
from scale_dit.callbacks.statistics import batch_size, peak_memory
from scale_dit.callbacks.time_limit import TimeLimit
from scale_dit.errors import UserError
from scale_dit.loggers import has_wandb_key, wandb_logger, wandb_run_id
from scale_dit.run_folder import LAST
from scale_dit.training import train

STEPS = 4
SAMPLES = (
    "callbacks.samples={_target_:scale_dit.callbacks.samples.SamplePictures,folder:${paths.output_dir}/samples,"
    "prompts:[a large red circle on sand,two yellow rings],every_n_steps:2,steps:2,side:128}"
)


def checkpoint(folder: Path) -> dict:
    return torch.load(folder / LAST)


@pytest.fixture(scope="module")
def plain(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run without sample pictures."""
    folder = tmp_path_factory.mktemp("runs") / "plain"
    train(training_config(small_folder, folder, f"trainer.max_steps={STEPS}"))
    return folder


@pytest.fixture(scope="module")
def sampled(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same run with sample pictures every second step."""
    folder = tmp_path_factory.mktemp("runs") / "sampled"
    options = (f"trainer.max_steps={STEPS}", "logger=tensorboard", "model.gradient_checkpointing=true")
    train(training_config(small_folder, folder, *options, SAMPLES))
    return folder


def test_sample_pictures_are_written_and_previewed(sampled: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sheets = sorted((sampled / "samples").iterdir())
    assert [sheet.name for sheet in sheets] == ["step_0000002.png", "step_0000004.png"]
    with Image.open(sheets[0]) as sheet:
        assert sheet.width == 2 * 128 + 3 * 12
        assert len(set(sheet.convert("L").getdata())) > 50
    events = EventAccumulator(str(sampled / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Images("samples")] == [2, 4]
    assert len(events.Scalars("train/loss")) == STEPS


def test_sample_pictures_leave_no_trace_in_training(plain: Path, sampled: Path) -> None:
    one, other = checkpoint(plain), checkpoint(sampled)
    for name, weight in one["state_dict"].items():
        assert torch.equal(weight, other["state_dict"][name]), name
    for first, second in zip(one["optimizer_states"], other["optimizer_states"], strict=True):
        for key in first["state"]:
            assert torch.equal(first["state"][key]["exp_avg_sq"], second["state"][key]["exp_avg_sq"])


class TextEncoders(lightning.Callback):
    """Notes which there are after every step."""

    def __init__(self) -> None:
        self.notes: list[dict] = []

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        self.notes.append(pl_module.base.text_encoders)


def test_text_encoders_are_put_aside_once_all_prompts_are_encoded(small_folder: Path, tmp_path: Path) -> None:
    """They stayed on the card for the whole training: 10 GB on FLUX.1."""
    from scale_dit.training import build

    objects = build(training_config(small_folder, tmp_path, "trainer.max_steps=2", SAMPLES))
    base, noted = objects["model"].base, TextEncoders()
    encoders = base.text_encoders
    objects["trainer"].callbacks.append(noted)
    prompts = [("",), ("a large red circle on sand",), ("two yellow rings",)]
    expected = [base.encode_prompts(prompt) for prompt in prompts]
    objects["trainer"].fit(objects["model"], datamodule=objects["data"])
    assert noted.notes == [{}, {}]
    assert base.text_encoders == encoders
    assert (tmp_path / "samples" / "step_0000002.png").is_file()
    assert sorted(base.known_texts) == prompts
    for prompt, text in zip(prompts, expected, strict=True):
        assert torch.equal(base.encode_prompts(prompt).tokens, text.tokens)
        assert torch.equal(base.encode_prompts(prompt).pooled, text.pooled)


class Disturbance(lightning.Callback):
    """Notes the random state and modes around sample pictures."""

    def __init__(self) -> None:
        self.notes: list[tuple] = []

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        modes = tuple(module.training for module in pl_module.modules())
        weights = [parameter.clone() for parameter in pl_module.parameters() if parameter.requires_grad]
        self.notes.append((torch.get_rng_state(), modes, weights))


def test_random_states_modes_and_weights_are_put_back(small_folder: Path, tmp_path: Path) -> None:
    from scale_dit.training import build

    cfg = training_config(small_folder, tmp_path, "trainer.max_steps=2", SAMPLES)
    objects = build(cfg)
    before, after = Disturbance(), Disturbance()
    trainer = objects["trainer"]
    position = next(i for i, each in enumerate(trainer.callbacks) if isinstance(each, SamplePictures))
    trainer.callbacks[position : position + 1] = [before, trainer.callbacks[position], after]
    trainer.fit(objects["model"], datamodule=objects["data"])
    assert (tmp_path / "samples" / "step_0000002.png").is_file()
    for one, other in zip(before.notes, after.notes, strict=True):
        assert torch.equal(one[0], other[0])
        assert one[1] == other[1]
        assert all(torch.equal(*pair) for pair in zip(one[2], other[2], strict=True))


def test_samples_that_cannot_be(small_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sample prompts is empty"):
        SamplePictures(tmp_path, [])
    with pytest.raises(UserError, match="2 seeds were given for 1 sample prompts"):
        SamplePictures(tmp_path, ["a"], seeds=[0, 1])
    with pytest.raises(UserError, match="500"):
        train(training_config(small_folder, tmp_path, SAMPLES.replace("steps:2,", "steps:2,height:500,")))


def test_statistics_in_the_log(plain: Path) -> None:
    with (plain / "metrics.csv").open() as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert [row["step"] for row in rows] == list(range(STEPS))
    for row in rows:
        assert row["speed/pictures_per_second"] == pytest.approx(2 * row["speed/steps_per_second"])
        assert 0.05 < row["memory/peak_gib"] < 64
        assert row["train/gradient_norm"] > 0
    cosine = [0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / (STEPS - 1))) for step in range(STEPS - 1)]
    assert [row["train/learning_rate"] for row in rows] == pytest.approx([1e-3, *(1e-3 * each for each in cosine)])


def test_the_gradient_norm_is_the_one_before_clipping(small_folder: Path, tmp_path: Path) -> None:
    norms = []
    for name, clip in (("clipped", "1e-6"), ("unclipped", "null")):
        options = ("trainer.max_steps=1", f"trainer.gradient_clip_val={clip}")
        metrics, _ = train(training_config(small_folder, tmp_path / name, *options))
        norms.append(metrics["train/gradient_norm"])
    assert norms[0] == norms[1] > 1e-6


def test_batch_size_and_memory() -> None:
    assert batch_size({"caption": ["a"], "latents": torch.zeros(3, 4, 2), "scale": torch.tensor(1.0)}) == 3
    assert peak_memory(torch.device("cpu")) > 50 * 2**20


def test_average_against_its_formula() -> None:
    module = lightning.LightningModule()
    module.weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    module.frozen = torch.nn.Parameter(torch.zeros(3), requires_grad=False)
    average = TrainableEMA(decay=0.5)
    trainer = SimpleNamespace(global_step=0, callbacks=[average], lightning_module=module)
    average.on_train_start(trainer, module)
    expected = torch.zeros(3, dtype=torch.float64)
    for step in range(1, 20):
        trainer.global_step = step
        module.weight.data += step
        average.on_train_batch_end(trainer, module)
        average.on_train_batch_end(trainer, module)  # a second batch of the same optimiser step changes nothing
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * module.weight.data
    assert set(average.average) == {"weight"}
    torch.testing.assert_close(average.average["weight"], expected, rtol=1e-12, atol=1e-12)
    before = module.weight.detach().clone()
    with averaged_weights(trainer):
        assert torch.equal(module.weight, average.average["weight"])
    assert torch.equal(module.weight, before)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_decay_that_is_none(decay: float) -> None:
    with pytest.raises(UserError, match="at least 0 and below 1"):
        TrainableEMA(decay)


def test_without_a_terminal_progress_is_lines_with_the_time_left(
    small_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    progress = "callbacks.progress={_target_:scale_dit.callbacks.progress.TrainingProgress,line_seconds:0}"
    with caplog.at_level(logging.INFO, logger="scale_dit"):
        train(
            training_config(small_folder, tmp_path, "trainer.max_steps=3", progress, "trainer.enable_progress_bar=true")
        )
    lines = [record.message for record in caplog.records if record.name == "scale_dit.callbacks.progress"]
    assert len(lines) == 2
    assert lines[0].startswith("step 2 of 3, train/loss ")
    assert lines[1].endswith(" steps/s, 0:00:00 left")


def test_the_bar_in_a_terminal_counts_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    progress = TrainingProgress()
    assert progress.is_enabled
    assert progress._get_train_description(0) == "Training"


def test_wandb_is_offline_without_a_key_and_online_with_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not has_wandb_key()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert has_wandb_key()
    (tmp_path / "netrc").write_text("machine example.org login user password secret\n")
    assert not has_wandb_key()
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert has_wandb_key()


def test_the_wandb_run_id_stays_with_the_folder(tmp_path: Path) -> None:
    run_id = wandb_run_id(tmp_path / "run")
    assert wandb_run_id(tmp_path / "run") == run_id
    assert wandb_run_id(tmp_path / "other") != run_id
    with pytest.raises(UserError, match="unknown W&B mode 'cloud': use one of auto, online, offline"):
        wandb_logger(tmp_path, "project", mode="cloud")


@pytest.mark.slow
def test_wandb_offline_keeps_its_run_over_a_resumption(
    small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scale_dit.errors import Interrupted

    monkeypatch.setenv("WANDB_MODE", "offline")
    options = ("logger=wandb", "trainer.max_steps=3", SAMPLES)
    interrupt = "+callbacks.signal={_target_:training_runs.SignalAt,step:1}"
    with pytest.raises(Interrupted):
        train(training_config(small_folder, tmp_path, *options, interrupt))
    train(training_config(small_folder, tmp_path, *options, f"resume={tmp_path}"))
    runs = sorted(folder.name for folder in (tmp_path / "wandb").glob("offline-run-*"))
    run_id = (tmp_path / "wandb_run_id.txt").read_text().strip()
    assert runs
    assert all(name.endswith(run_id) for name in runs)
    import wandb

    assert wandb.run is None
    assert math.isfinite(checkpoint(tmp_path)["global_step"])


def test_time_limit_ends_a_run_at_its_next_look_at_the_clock(small_folder: Path, tmp_path: Path) -> None:
    limit = (
        "+callbacks.limit={_target_:scale_dit.callbacks.time_limit.TimeLimit,duration:'00:00:00:00',every_n_steps:3}"
    )
    _, objects = train(training_config(small_folder, tmp_path, "trainer.max_steps=100", limit))
    assert objects["trainer"].global_step == 0  # time that is spent already ends it before the first step
    late = TimeLimit("00:00:00:00", every_n_steps=3)
    asked = []
    trainer = SimpleNamespace(global_step=0, should_stop=False, strategy=SimpleNamespace(broadcast=asked.append))
    for trainer.global_step in range(1, 8):
        late.on_train_batch_end(trainer, None, None, None, 0)
    assert asked == [True, True]  # after steps 3 and 6
