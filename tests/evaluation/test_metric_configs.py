"""Every file in `configs/metrics` makes metrics of the right names."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from scale_dit.evaluation.metric import Metric

CONFIGS = Path(__file__).parents[2] / "configs"


def metrics_of(choice: str) -> dict[str, Metric]:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose(overrides=[f"+metrics={choice}", "+scale=4"])
    return instantiate(config.metrics, _convert_="all")


@pytest.mark.parametrize("choice", sorted(path.stem for path in (CONFIGS / "metrics").glob("*.yaml")))
def test_each_config_makes_metrics_that_bear_their_keys(choice):
    found = metrics_of(choice)
    assert found
    for name, metric in found.items():
        assert isinstance(metric, Metric)
        assert metric.name == name
        assert metric.needs
        assert metric.available() is None or len(metric.available()) > 20


def test_metrics_can_be_chosen_singly():
    assert list(metrics_of("[scenes,detail]")) == ["scenes", "detail"]
    assert len(metrics_of("default")) == 10
