"""Arms of an evaluation on a small random base: each turns what it says and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import hydra
import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file, save_file
from small_bases import SETTINGS, add_random_lora

from scale_dit.errors import UserError
from scale_dit.evaluation.baselines import Setting, Variant, choose_arms, default_lora
from scale_dit.evaluation.entry import evaluate_config
from scale_dit.lora import FILE_NAME, LoraSettings, save_lora
from scale_dit.method import Method
from scale_dit.pipeline import ScaleDiTPipeline

ROOT = Path(__file__).parents[2]
BASELINES = sorted(path.stem for path in (ROOT / "configs" / "baseline").glob("*.yaml"))


@pytest.fixture(scope="module")
def lora_folder(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipeline = ScaleDiTPipeline.from_pretrained(small_folder)
    add_random_lora(pipeline.base)
    folder = tmp_path_factory.mktemp("lora")
    save_lora(pipeline.transformer, folder, LoraSettings(4, 4), {"base": SETTINGS.name} | Method().summary)
    return folder


@pytest.fixture
def setting(small_folder: Path, lora_folder: Path) -> Setting:
    pipeline = ScaleDiTPipeline.from_pretrained(small_folder)
    pipeline.set_progress_bar_config(disable=True)
    return Setting(pipeline, Method(scale=2.0), str(lora_folder), 256, 256, start=0.7)


def configured(names: list[str]) -> dict:
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("eval", overrides=[f"+baseline=[{','.join(names)}]"])
    return hydra.utils.instantiate(cfg.baselines, _convert_="all")


def test_every_baseline_makes_other_pictures_from_the_same_draft(setting: Setting) -> None:
    arms = choose_arms(configured(BASELINES), setting)
    outputs = {name: arm.generate(["a red circle"], [7]) for name, arm in arms.items()}
    for output in outputs.values():
        assert output.images.shape == (1, 3, 256, 256)
        assert torch.isfinite(output.images).all()
    # At a start of 0.7 these are the same by definition.
    same = {frozenset({"scale_dit", "from_draft"}), frozenset({"no_lora", "from_draft_no_lora"})}
    for first in outputs:
        for second in outputs:
            if first < second:
                equal = torch.equal(outputs[first].images, outputs[second].images)
                assert equal == (frozenset({first, second}) in same), (first, second)
    drafts = [output.drafts for output in outputs.values() if output.drafts is not None]
    assert len(drafts) >= 5
    assert all(torch.equal(draft, drafts[0]) for draft in drafts)


def test_an_arm_does_not_leave_its_lora_to_the_next(setting: Setting) -> None:
    arms = choose_arms({"no_lora": Variant(lora=False)}, setting)
    before = arms["no_lora"].generate(["a red circle"], [7]).images
    arms["scale_dit"].generate(["a red circle"], [7])
    assert torch.equal(arms["no_lora"].generate(["a red circle"], [7]).images, before)


def test_a_lora_without_a_record_is_evaluated_as_that_of_the_base_given(setting: Setting, tmp_path: Path) -> None:
    wanted = Variant().arm(setting).generate(["a red circle"], [7]).images
    save_file(load_file(Path(setting.lora) / FILE_NAME), tmp_path / "bare.safetensors")
    bare = replace(setting, lora=str(tmp_path / "bare.safetensors"), lora_base=SETTINGS.name)
    torch.testing.assert_close(Variant().arm(bare).generate(["a red circle"], [7]).images, wanted)
    bare.pipeline.unload_lora_weights()
    with pytest.raises(UserError, match=r"lora\.base=small"):
        Variant().arm(replace(bare, lora_base=None)).generate(["a red circle"], [7])


def test_settings_tell_arms_and_loras_apart(setting: Setting) -> None:
    setting.start = 0.8
    arms = choose_arms(configured(BASELINES), setting)
    records = {str(sorted(arm.settings.items(), key=str)) for arm in arms.values()}
    assert len(records) == len(arms)


def test_an_unknown_arm_is_named_with_those_that_there_are(setting: Setting) -> None:
    with pytest.raises(UserError, match=r"no arm 'dnese'.*scale_dit, dense"):
        choose_arms({"dense": Variant(method={"windowed": False, "halo_cells": 0})}, setting, only=["dnese"])


def test_no_lora_and_a_missing_one(tmp_path: Path) -> None:
    assert default_lora(None) is None
    assert default_lora("none") is None
    with pytest.raises(UserError, match=r"does not exist.*lora.path=none"):
        default_lora(str(tmp_path / "missing"))


def test_eval_config_end_to_end(small_folder: Path, lora_folder: Path, tmp_path: Path) -> None:
    overrides = [
        "+baseline=[dense,bicubic]", "metrics=scenes", "logger=csv", "n=2", "scale=2",
        f"base.path={small_folder}", "base.name=small",
        "base.native=128", "base.text_length=24", "base.steps=1", f"lora.path={lora_folder}", "device=cpu",
        f"paths.output_dir={tmp_path}",
    ]  # fmt: skip
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("eval", overrides=overrides)
    results = evaluate_config(cfg)
    assert results.arms == ["scale_dit", "dense", "bicubic"]
    assert results.row("dense - scale_dit", "count") is not None
    for name in ("results.json", "results.csv", "pictures.png", "run.json"):
        assert (tmp_path / name).is_file()
