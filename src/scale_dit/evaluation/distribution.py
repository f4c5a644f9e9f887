"""FID, KID and Inception score: torchmetrics' arithmetic over features of a network chosen by config.

The features of every picture are extracted once and kept (a few KB each), which also gives intervals over pictures
without running the network again.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib.metadata import version
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from scale_dit.errors import UserError
from scale_dit.evaluation.features import FeatureNetwork, metric_name
from scale_dit.evaluation.intervals import recentred_bootstrap
from scale_dit.evaluation.metric import Figure, Record

REFERENCE = "reference"
LARGEST_FRECHET_BOOTSTRAP = 500


class _Features(nn.Module):
    """Hands features that are already extracted through torchmetrics."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


class SetMetric:
    """What FID, KID and IS share: a network, its features per arm and picture, and how the number must be quoted."""

    kind: ClassVar[str]
    output: ClassVar[str] = "features"

    def __init__(self, network: FeatureNetwork) -> None:
        self.network = network
        self.name = metric_name(self.kind, network)
        self.needs = (f"the {network.name} network",)
        self._features: dict[str, dict[int, Tensor]] = {}

    def available(self) -> str | None:
        """What the network lacks, if anything."""
        return self.network.available()

    def update(self, arm: str, images: Tensor, prompts: Sequence[str], records: Sequence[Record]) -> None:
        """Extract and keep the pictures' features."""
        self._store(arm, images, records)

    def per_picture(self, arm: str) -> dict[str, dict[int, float]]:
        """Empty: a distance belongs to a set."""
        return {}

    def _store(self, arm: str, images: Tensor, records: Sequence[Record]) -> None:
        features = getattr(self.network, self.output)(images)
        kept = self._features.setdefault(arm, {})
        for record, feature in zip(records, features, strict=True):
            kept[record.index] = feature

    def _stacked(self, arm: str) -> Tensor:
        kept = self._features.get(arm, {})
        return torch.stack([kept[index] for index in sorted(kept)]) if kept else torch.empty(0, self.network.width)

    def _note(self, extra: str) -> str:
        return f"{self.network.preprocessing}; {extra}; torchmetrics {version('torchmetrics')}"


class _AgainstReference(SetMetric, ABC):
    """A distance to the true pictures. Each true picture enters once, whichever arm brings it."""

    def update(self, arm: str, images: Tensor, prompts: Sequence[str], records: Sequence[Record]) -> None:
        """Extract and keep the features of the pictures, and of true pictures not seen before."""
        self._store(arm, images, records)
        seen = self._features.setdefault(REFERENCE, {})
        new = [(record, record.reference) for record in records if record.index not in seen]
        known = [(record, true) for record, true in new if true is not None]
        if known:
            self._store(REFERENCE, torch.stack([true for _, true in known]), [record for record, _ in known])

    def compute(self, arm: str) -> dict[str, Figure]:
        """The distance, with an interval and the distance between two halves of the true pictures as its floor."""
        true, made = self._stacked(REFERENCE), self._stacked(arm)
        if len(true) < 4 or len(made) < 2:
            return {}
        value = self.distance(true, made)
        floor = self.floor(true)
        note = self._note(
            f"N={len(made)} against the {len(true)} true pictures of the same prompts; "
            f"two halves of the true pictures are {floor:.4g} apart (N={len(true) // 2})"
        )
        return {self.name: Figure(value, *self.interval(true, made, value), len(made), "", note)}

    @abstractmethod
    def distance(self, true: Tensor, made: Tensor) -> float:
        """Distance between two sets of features `[N, D]` and `[M, D]`, by torchmetrics."""

    def floor(self, true: Tensor) -> float:
        """Distance between the even and the odd true pictures: what no method can be expected to undercut."""
        return self.distance(true[::2], true[1::2])

    @abstractmethod
    def interval(self, true: Tensor, made: Tensor, value: float) -> tuple[float | None, float | None]:
        """95 % interval around `value`, over the made pictures; (None, None) where it would cost too much."""


class FrechetDistance(_AgainstReference):
    """Fréchet distance between Gaussian fits of the features (Heusel et al. 2017): FID with the Inception network.

    N decides its size: the same photographs score 130 at N = 50 and 26 at N = 1,000 against themselves. Compare only
    numbers with the same N, and quote the floor that the note states.
    """

    kind = "fid"

    def distance(self, true: Tensor, made: Tensor) -> float:
        """Distance between two sets of features `[N, D]` and `[M, D]`, by torchmetrics."""
        from torchmetrics.image.fid import FrechetInceptionDistance

        metric = FrechetInceptionDistance(feature=_Features(self.network.width))
        metric.update(true.double(), real=True)
        metric.update(made.double(), real=False)
        return float(metric.compute())

    def floor(self, true: Tensor) -> float:
        """As above, by the formula that takes seconds where the eigenvalues of a D x D matrix take a minute."""
        features = true.double().numpy()
        return frechet_from_features(features[::2], features[1::2])

    def interval(self, true: Tensor, made: Tensor, value: float) -> tuple[float | None, float | None]:
        """95 % interval around `value`, over the made pictures; (None, None) where it would cost too much."""
        if max(len(true), len(made)) > LARGEST_FRECHET_BOOTSTRAP:
            return None, None
        first, second = true.double().numpy(), made.double().numpy()
        return recentred_bootstrap(lambda drawn: frechet_from_features(first, second[drawn]), len(second), value)


class KernelDistance(_AgainstReference):
    """Squared maximum mean discrepancy with a cubic kernel (Bińkowski et al. 2018): KID with the Inception network.

    Unbiased in N, hence the one to read below 2,000 pictures.

    Args:
        network: the feature network.
        subset_size: pictures per subset; fewer where there are not so many.
        subsets: subsets to average over.
    """

    kind = "kid"

    def __init__(self, network: FeatureNetwork, subset_size: int = 1000, subsets: int = 100) -> None:
        super().__init__(network)
        self.subset_size = subset_size
        self.subsets = subsets

    def distance(self, true: Tensor, made: Tensor) -> float:
        """Distance between two sets of features `[N, D]` and `[M, D]`, by torchmetrics."""
        from torchmetrics.image.kid import KernelInceptionDistance

        size = min(self.subset_size, len(true), len(made))
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance` will save")
            torch.manual_seed(0)
            metric = KernelInceptionDistance(_Features(self.network.width), subsets=self.subsets, subset_size=size)
            metric.update(true.double(), real=True)
            metric.update(made.double(), real=False)
            return float(metric.compute()[0])

    def interval(self, true: Tensor, made: Tensor, value: float) -> tuple[float | None, float | None]:
        """95 % interval around `value`, over the made pictures; (None, None) where it would cost too much."""
        first, second = true.double().numpy(), made.double().numpy()
        width = first.shape[1]
        within = (second @ second.T / width + 1) ** 3
        across = ((second @ first.T / width + 1) ** 3).mean(axis=1)

        def discrepancy(drawn: np.ndarray) -> float:
            kernel = within[np.ix_(drawn, drawn)]
            distinct = drawn[:, None] != drawn[None, :]
            return float(kernel[distinct].mean() - 2 * across[drawn].mean())

        return recentred_bootstrap(discrepancy, len(second), value)


class InceptionScore(SetMetric):
    """exp of the mean KL divergence between a picture's classes and the arm's (Salimans et al. 2016).

    Args:
        network: the feature network; only Inception's number is called IS.
        splits: parts to average over, at most one per picture.
    """

    kind = "is"
    output = "logits"

    def __init__(self, network: FeatureNetwork, splits: int = 10) -> None:
        super().__init__(network)
        if splits < 1:
            raise UserError(f"the Inception score needs at least one split, got {splits}")
        self.splits = splits

    def compute(self, arm: str) -> dict[str, Figure]:
        """The score, with a bootstrap interval."""
        logits = self._stacked(arm)
        if not len(logits):
            return {}
        splits = min(self.splits, len(logits))
        value = self.score(logits, splits)
        low, high = recentred_bootstrap(lambda drawn: self.score(logits[drawn], splits), len(logits), value, 100)
        note = self._note(f"N={len(logits)}, {splits} splits")
        return {self.name: Figure(value, low, high, len(logits), "", note)}

    def score(self, logits: Tensor, splits: int) -> float:
        """Inception score of logits `[N, classes]`, by torchmetrics."""
        from torchmetrics.image.inception import InceptionScore as Score

        # torchmetrics shuffles with the global generator, and the spread of one split is NaN, with a warning.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            torch.manual_seed(0)
            metric = Score(_Features(logits.shape[1]), splits=splits)
            metric.update(logits.double())
            return float(metric.compute()[0])


def frechet_from_features(first: np.ndarray, second: np.ndarray) -> float:
    """Fréchet distance between two sets of features `[N, D]` and `[M, D]`, exact also for N < D.

    The trace of the square root of the covariance product is the nuclear norm of X1 X2^T, with X centred and divided
    by sqrt(n - 1): no square root of a singular D x D matrix.
    """
    means = first.mean(axis=0), second.mean(axis=0)
    centred = [(x - mean) / np.sqrt(max(len(x) - 1, 1)) for x, mean in zip((first, second), means, strict=True)]
    root = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    spread = sum(float(np.square(x).sum()) for x in centred)
    return float(np.square(means[0] - means[1]).sum() + spread - 2 * root)
