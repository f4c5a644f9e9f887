"""The autoencoder's attention: every way equals torch's, and how a way is chosen."""

from __future__ import annotations

import pytest
import torch
from small_bases import noise

from scale_dit.autoencoder.attention import WAYS, attend_all, way_on

CPU = torch.device("cpu")


def test_processors_and_float32_take_torchs_own():
    assert way_on(CPU, torch.bfloat16) == "torch"
    assert way_on(torch.device("meta"), torch.float32) == "torch"
    assert way_on(torch.device("meta"), torch.bfloat16) == "softmax", "a plan without a card counts scores"


@pytest.mark.gpu
def test_a_card_with_triton_takes_the_kernel():
    assert way_on(torch.device("cuda"), torch.bfloat16) == "weighed"


@pytest.mark.gpu
@pytest.mark.parametrize("way", [way for way in WAYS if way != "torch"])
def test_ways_equal_float64_on_a_card(way):
    """Several parts of rows, whose number nothing divides."""
    query, key, value = (noise(1, 1, count, 512, seed=seed).cuda() for seed, count in enumerate((999, 5001, 5001)))
    right = (query.double() @ key.double().transpose(2, 3) * 512**-0.5).softmax(-1) @ value.double()
    half = [part.bfloat16() for part in (query, key, value)]
    actual = attend_all(*half, score_bytes=100 * 4 * 5001, way=way)
    assert actual.dtype == torch.bfloat16
    error = (actual.double() - right).norm() / right.norm()
    assert error < 0.01
