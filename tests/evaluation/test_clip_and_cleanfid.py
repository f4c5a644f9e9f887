"""CLIP score and clean-fid through their libraries' own code, and what is said where weights are missing."""

from __future__ import annotations

import json

import pytest
import torch

from scale_dit.evaluation.cleanfid import CleanFID
from scale_dit.evaluation.clip import ClipScore, is_torchscript, token_count
from scale_dit.evaluation.metric import Metric, Record
from scale_dit.picture_files import save_picture

SMALL_CLIP = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}


@pytest.fixture
def small_clip(tmp_path):
    """A small CLIP of open_clip's own make with random weights, on disk."""
    open_clip = pytest.importorskip("open_clip")
    (tmp_path / "small-quickgelu.json").write_text(json.dumps(SMALL_CLIP))
    open_clip.add_model_config(tmp_path)
    torch.manual_seed(0)
    model = open_clip.create_model("small-quickgelu", load_weights=False)
    torch.save(model.state_dict(), tmp_path / "small.pt")
    return tmp_path


def test_clip_score_runs_from_a_local_file_and_says_how_many_texts_were_cut(small_clip):
    metric = ClipScore(str(small_clip), "small-quickgelu", device="cpu")
    assert isinstance(metric, Metric)
    assert metric.available() is None
    prompts = ["a red ring", "a very " + "long " * 200 + "text"]
    records = [Record(i, prompt, i) for i, prompt in enumerate(prompts)]
    metric.update("arm", torch.rand(2, 3, 50, 70), prompts, records)
    figures = metric.compute("arm")
    assert figures["clip_text_cut"].value == 0.5
    assert 0 <= figures["clip_score"].value <= 100
    assert figures["clip_score"].n == 2
    assert set(metric.per_picture("arm")) == {"clip_score"}


def test_a_cut_text_keeps_its_end_token(small_clip):
    """CLIP reads the sentence at its end token; a text cut after tokenizing has lost it."""
    metric = ClipScore(str(small_clip), "small-quickgelu", device="cpu")
    _, _, tokenizer = metric._loaded
    long = "blue " * 200
    assert token_count(tokenizer, long) == 202
    assert tokenizer([long]).tolist() == tokenizer(["blue " * 75]).tolist()
    assert tokenizer([long])[0, -1] == tokenizer.encoder["<end_of_text>"]
    assert metric.score(torch.rand(2, 3, 40, 40), [long, "blue " * 75])[1] == [True, False]


def test_missing_clip_weights_are_a_plain_message(tmp_path):
    for metric in (ClipScore(), ClipScore(str(tmp_path))):
        assert "ViT-B-16.pt" in metric.available()


def test_openai_weights_need_the_quickgelu_architecture(tmp_path):
    """With another activation the same weights load without a word and give wrong scores."""
    path = tmp_path / "ViT-B-32.pt"
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
    assert is_torchscript(path)
    assert "ViT-B-32-quickgelu" in ClipScore(str(path), "ViT-B-32").available()
    assert ClipScore(str(path), "ViT-B-32-quickgelu").available() is None
    torch.save({"a": torch.zeros(1)}, tmp_path / "plain.pt")
    assert not is_torchscript(tmp_path / "plain.pt")


def test_missing_clean_fid_weights_are_a_plain_message(tmp_path, monkeypatch):
    pytest.importorskip("cleanfid")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    message = CleanFID(str(tmp_path)).available()
    assert "inception-2015-12-05.pt" in message
    assert str(tmp_path) in message


def written(folder, images):
    """Records of pictures on disk: the same as the truth, and half as bright."""
    records = {"same": [], "dark": []}
    for i, image in enumerate(images):
        true = folder / "true" / f"{i}.png"
        save_picture(image, true)
        for arm, factor in (("same", 1.0), ("dark", 0.5)):
            path = folder / arm / f"{i}.png"
            save_picture(image * factor, path)
            records[arm].append(Record(i, "", i, path=path, reference_path=true))
    return records


def test_clean_fid_measures_exactly_the_files_it_was_shown(tmp_path):
    """The folders may hold more pictures than this evaluation has prompts."""
    pytest.importorskip("cleanfid")
    images = torch.rand(6, 3, 40, 40)
    records = written(tmp_path, images)
    save_picture(torch.zeros(3, 40, 40), tmp_path / "same" / "of_an_earlier_run.png")
    metric = CleanFID(str(tmp_path), device="cpu")
    # Few features: the library's matrix square root takes half a minute with 2,048.
    metric.network = Pooled()
    for arm, known in records.items():
        metric.update(arm, images, [""] * 6, known)
    same, dark = metric.compute("same")["clean_fid"], metric.compute("dark")["clean_fid"]
    assert same.value == pytest.approx(0, abs=1e-2)
    assert dark.value > 10
    assert "N=6" in same.note


def test_clean_fid_loads_its_network_from_a_local_file(tmp_path):
    """And gets its features from it; the distance itself takes half a minute with 2,048 of them, so above with few."""
    fid = pytest.importorskip("cleanfid.fid")
    torch.jit.script(LikeInception()).save(str(tmp_path / "inception-2015-12-05.pt"))
    metric = CleanFID(str(tmp_path), device="cpu")
    assert metric.available() is None
    images = torch.rand(6, 3, 40, 40)
    written(tmp_path, images)
    features, few = (
        torch.from_numpy(
            fid.get_folder_features(str(tmp_path / "dark"), network, num_workers=0, device=metric.device, verbose=False)
        )
        for network in (metric.network, Pooled())
    )
    assert features.shape == (6, 2048)
    torch.testing.assert_close(features[:, :12], few / 128 - 1)
    assert features[:, :12].std() > 0
    assert not features[:, 12:].any()


class Pooled(torch.nn.Module):
    """Twelve pooled colours."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(x, (2, 2)).flatten(1)


class Padded(torch.nn.Module):
    """Twelve pooled colours among 2,048 features."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = torch.nn.functional.adaptive_avg_pool2d(x, (2, 2)).flatten(1)
        return torch.nn.functional.pad(pooled, (0, 2036))


class LikeInception(torch.nn.Module):
    """The interface of the TorchScript Inception."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = Padded()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)
