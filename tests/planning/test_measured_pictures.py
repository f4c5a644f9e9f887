"""Today's plan, with the profile of the card that is shipped, beside pictures that were measured on such a card."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from full_size import STUDY, study

from scale_dit.generation.pictures import Sampling
from scale_dit.method import Method
from scale_dit.models.random_weights import write_configs
from scale_dit.planning.components import Components
from scale_dit.planning.machine import SHIPPED, Machine
from scale_dit.planning.memory import Memory
from scale_dit.planning.predict import Planner
from scale_dit.planning.work import Tracer


def measured(base: str) -> dict[str, dict[str, tuple[float, float]]]:
    """Seconds and peak GB of whole pictures without a cap, by size and stage."""
    found: defaultdict[str, dict[str, tuple[float, float]]] = defaultdict(dict)
    for row in filter(study("run").is_whole, study("run").read(STUDY / "pictures.csv")):
        if row["base"] == base:
            found[row["px"]][row["stage"]] = float(row["seconds"]), float(row["peak_gb"])
    return found


@pytest.mark.parametrize(("base", "sizes"), [("flux1_dev", ("2048", "4096", "8192")), ("klein_9b", ("4096", "8192"))])
def test_a_picture_takes_what_was_planned(base, sizes, tmp_path):
    settings, machine = write_configs(base, tmp_path), Machine.load(SHIPPED / "nvidia-h100-80gb-hbm3-bfloat16.json")
    components = Components.of(settings, torch.bfloat16)
    tracer = Tracer(settings, Method(), Sampling(), components, "triton", torch.device("cpu"))
    planner = Planner(tracer, components, machine, Memory(offload="none", decode="streamed"), on_gpu=True)
    pictures = measured(base)
    for side in sizes:
        found, taken = planner.predict(int(side), int(side), planner.ways[0]), pictures[side]
        for stage in ("draft", "refine", "decode"):
            assert found.seconds[stage] == pytest.approx(taken[stage][0], rel=0.2), (side, stage)
        assert sum(found.seconds.values()) == pytest.approx(sum(seconds for seconds, _ in taken.values()), rel=0.1)
        for stage, peak in found.peak_bytes.items():
            assert peak / 1e9 == pytest.approx(taken[stage][1], rel=0.03), (side, stage)
