"""Predictions and choices on FLUX.1 of full size without weights, and on the small base."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from full_size import flux1_dev

from scale_dit.errors import UserError
from scale_dit.generation.pictures import Sampling
from scale_dit.method import Method
from scale_dit.models.settings import BaseSettings
from scale_dit.planning.components import Components, size_of
from scale_dit.planning.machine import Machine
from scale_dit.planning.memory import PART, Memory, Weights
from scale_dit.planning.predict import Planner
from scale_dit.planning.work import Tracer

FLUX1 = BaseSettings(name="flux1_dev")
# Round numbers of the size of an H100's: what is tested is what follows from them.
CARD = Machine("card", "torch.bfloat16", 7e14, 4e14, 6e14, 4e14, 3e12, 5e-6, 5e10, "")
GB = 10**9


def planner(memory: Memory | None = None, base: BaseSettings = FLUX1, components: Components | None = None) -> Planner:
    # Few blocks, so that tests are quick: everything but the weights is then that of FLUX.1.
    components = components or flux1_dev((1, 4))
    tracer = Tracer(base, Method(order="window"), Sampling(), components, "triton", torch.device("cpu"))
    return Planner(tracer, components, CARD, memory or Memory(), on_gpu=True)


@pytest.fixture(scope="module")
def flux1() -> Planner:
    return planner()


def test_arithmetic_of_a_picture(flux1):
    layout = Method(order="window").plan(FLUX1, 4096, 4096).layout
    work = flux1.tracer.work(4096, 4096, 0)
    assert work.refine.flops("windowed") == 5 * layout.flops(24, 128)
    tokens, width = 512 + 65_536, 3072
    arithmetic = 5 * 24 * tokens * width**2
    assert work.refine.flops("matmul") == pytest.approx(arithmetic, rel=0.02), "24 S C^2 a block, and a little"
    assert work.guidance.kept == pytest.approx(5 * 2 * 4096 * width * 2, rel=0.02)
    assert (work.refine_steps, work.draft_steps) == (28, 28)


def test_seconds_follow_from_rates(flux1):
    slow = replace(CARD, **{rate: getattr(CARD, rate) / 2 for rate in ("matmul", "attention", "windowed", "bandwidth")})
    way = flux1.ways[0]
    refine = flux1.predict(4096, 4096, way).seconds["refine"]
    work = flux1.tracer.work(4096, 4096, way.tokens)
    slower = 28 * slow.seconds(work.refine) + slow.seconds(work.guidance)
    assert slower == pytest.approx(2 * refine, rel=0.01)


def test_encoding_takes_the_drafts_place(flux1):
    sizes = [(1024, 1024), (4096, 4096)]
    for way in flux1.ways:
        found = flux1.predict(4096, 4096, way)
        nothing, both = (flux1.encoded(found, some, 10**12) for some in ([], sizes))
        one = [flux1.encoded(found, [size], 10**12).seconds["draft"] for size in sizes]
        transformer, autoencoder = (
            part / CARD.host_copy * (way.offload == "model")
            for part in (flux1.weights.transformer, flux1.weights.autoencoder)
        )
        assert nothing.seconds.keys() == nothing.peak_bytes.keys() == found.seconds.keys() - {"draft"}
        assert both.seconds["draft"] == pytest.approx(sum(one) - autoencoder)
        assert both.seconds["refine"] == nothing.seconds["refine"] == found.seconds["refine"] + transformer
    decode = flux1.tracer.work(4096, 4096, 0).decode
    for whole, mode in ((True, "whole"), (False, "streamed")):
        encode = flux1.tracer.encoding(4096, 4096, whole)
        assert 0.5 < CARD.seconds(encode) / CARD.seconds(decode[mode]) < 0.7, "fewer layers than the decoder has"
    tight = flux1.encoded(found, sizes, 10 * GB)
    assert tight.peak_bytes["draft"] < both.peak_bytes["draft"], "streamed"


def test_windowed_refine_needs_less_than_stock_dense(flux1):
    """Working memory of stock FLUX.1 at 4096 px is 6.98 GB (tested in `test_trace.py`), guidance not included."""
    kept = 57 / 5 * flux1.tracer.work(4096, 4096, 0).guidance.kept
    by_parts = flux1.tracer.work(4096, 4096, PART).refine.peak
    assert kept == pytest.approx(2.9e9, rel=0.02)
    assert kept + by_parts < 5.9e9
    assert flux1.ways[0].tokens == PART
    assert flux1.ways[0].keys_values == "device"
    assert by_parts < 0.5 * flux1.tracer.work(4096, 4096, 0).refine.peak


def test_ways_get_smaller(flux1):
    found = [flux1.predict(4096, 4096, way) for way in flux1.ways]
    refine = [each.peak_bytes["refine"] for each in found]
    assert refine == sorted(refine, reverse=True)
    assert refine[-1] < 0.4 * refine[0]


def test_weights_by_offloading():
    components = flux1_dev()
    weights = Weights.of(components, "native")
    assert weights.transformer == 2 * 11_901_408_320
    assert sum(weights.text) == pytest.approx(9.77e9, rel=0.01)
    everything = sum(map(size_of, components.modules.values()))
    assert weights.resident("none") == dict.fromkeys(("text", "draft", "refine", "decode"), everything)
    assert weights.resident("text")["refine"] == everything - sum(weights.text)
    assert weights.resident("model") == {
        "text": max(weights.text), "draft": weights.transformer, "refine": weights.transformer,
        "decode": weights.autoencoder,
    }  # fmt: skip
    assert weights.resident("group")["refine"] < 0.07 * weights.transformer
    assert weights.resident("group")["text"] == 2 * 2 * 4096 * 10240, "two layers of T5's feed-forward"
    assert weights.text_table == 2 * 4096 * 32128
    in_8_bits = Weights.of(components, "fp8")
    assert in_8_bits.transformer == weights.transformer - in_8_bits.cast
    assert 0.5 * weights.transformer < in_8_bits.transformer < 0.7 * weights.transformer


def test_choice_is_the_fastest_that_fits(flux1):
    limits = [round(flux1.predict(4096, 4096, way).peak * 1.01) for way in flux1.ways]
    assert flux1.choose([(1024, 1024), (4096, 4096)], max(limits)) == flux1.ways[0]
    for limit in limits:
        way = flux1.choose([(4096, 4096)], limit)
        assert flux1.predict(4096, 4096, way).peak <= limit
        for faster in flux1.ways[: flux1.ways.index(way)]:
            assert flux1.predict(4096, 4096, faster).peak > limit


def test_what_the_user_sets_is_kept():
    chosen = planner(Memory(offload="group", feed_forward_tokens=100, decode="streamed")).ways
    assert {(way.offload, way.feed_forward_tokens) for way in chosen} == {("group", 100)}
    assert [way.keys_values for way in chosen] == ["device", "host"]


def test_refusal_names_the_largest_size_that_fits():
    chosen = planner(Memory(offload="text", feed_forward_tokens=0, keys_values="device"))
    limit = 10 * GB
    with pytest.raises(UserError, match=r"height=\d+ width=\d+") as refused:
        chosen.choose([(4096, 8192)], limit)
    found = re.search(r"height=(\d+) width=(\d+)", str(refused.value))
    assert found is not None
    height, width = map(int, found.groups())
    assert width == pytest.approx(2 * height, abs=16)
    assert not height % 16
    assert not width % 16
    assert chosen.predict(height, width, chosen.ways[-1]).peak <= limit
    larger = (int(height * 1.1) // 16 * 16, int(width * 1.1) // 16 * 16)
    assert chosen.predict(*larger, chosen.ways[-1]).peak > limit
    assert "8192 x 4096 px" in str(refused.value)


def test_where_nothing_fits_the_refusal_says_so():
    with pytest.raises(UserError, match="not even a small picture"):
        planner().choose([(2048, 2048)], GB // 2)


def test_group_offloading_waits_for_weights():
    found = planner(Memory(offload="group"))
    slow = replace(CARD, host_copy=1e9)
    waiting = Planner(found.tracer, found.components, slow, found.settings, on_gpu=True)
    seconds = [each.predict(1024, 1024, each.ways[-1]).seconds["draft"] for each in (found, waiting)]
    assert seconds[1] == pytest.approx(28 * found.weights.blocks / 1e9, rel=0.01)
    assert seconds[0] < seconds[1]


def test_steps_wait_for_the_next_one_whatever_they_compute(flux1):
    waiting = Planner(flux1.tracer, flux1.components, replace(CARD, between_steps=1.0), flux1.settings, on_gpu=True)
    more = [waiting.predict(4096, 4096, flux1.ways[0]).seconds, flux1.predict(4096, 4096, flux1.ways[0]).seconds]
    beyond = {stage: more[0][stage] - more[1][stage] for stage in more[0]}
    assert beyond == pytest.approx({"text": 0, "draft": 28, "refine": 28 + 1, "decode": 0}), "and the guidance pass"


def test_blocks_come_at_their_own_rate_and_the_drafts_keys_and_values_with_them():
    found = planner(Memory(offload="group", keys_values="host"))
    slow = replace(CARD, host_copy=2e9, group_copy=1e9)
    work = found.tracer.work(1024, 1024, found.ways[-1].tokens)
    waiting = Planner(found.tracer, found.components, slow, found.settings, on_gpu=True)
    seconds = waiting.predict(1024, 1024, waiting.ways[-1]).seconds
    blocks, kept = waiting.weights.blocks, work.guidance.kept
    assert seconds["draft"] == pytest.approx(28 * blocks / 1e9)
    assert seconds["refine"] == pytest.approx((28 * (blocks + kept) + blocks) / 1e9 + kept / 2e9)


def test_a_second_branch_brings_every_block_again():
    """Classifier-free guidance calls the transformer twice a step."""
    one = planner(Memory(offload="group", keys_values="host"))
    base = replace(FLUX1, distilled=False)
    two = planner(Memory(offload="group", keys_values="host"), base, one.components)
    slow = replace(CARD, host_copy=1e9)
    one, two = (Planner(each.tracer, each.components, slow, each.settings, on_gpu=True) for each in (one, two))
    seconds = [each.predict(1024, 1024, each.ways[-1]).seconds for each in (one, two)]
    assert seconds[1]["draft"] == pytest.approx(2 * seconds[0]["draft"])
    guidance = one.predict(1024, 1024, one.ways[-1]).guidance_seconds
    assert seconds[1]["refine"] - guidance == pytest.approx(2 * (seconds[0]["refine"] - guidance))


def test_the_first_picture_pins_host_memory_and_loads_libraries():
    machine = replace(CARD, pinning=1e9, first_encoding=0.5)
    found = planner(Memory(offload="group", keys_values="host", decode="host"))
    found = Planner(found.tracer, found.components, machine, found.settings, on_gpu=True)
    others = found.predict(2048, 2048, found.ways[-1])
    first, work = others.as_first(), found.tracer.work(2048, 2048, found.ways[-1].tokens)
    beyond = {stage: first.seconds[stage] - others.seconds[stage] for stage in others.seconds}
    assert beyond == pytest.approx(
        {
            "text": 0.5,
            "draft": 0.0,
            "refine": work.guidance.kept / 1e9,
            "decode": work.host_bytes / 1e9,
        }
    )
    found.tracer.device = torch.device("cuda")  # a processor has but one memory
    encoded = found.encoded(others, [(8192, 8192)], GB)
    assert encoded.as_first().seconds["draft"] > encoded.seconds["draft"], "encoded in host memory"
    everything = planner().predict(2048, 2048, planner().ways[0])
    assert everything.as_first().seconds == everything.seconds, "all on the card, nothing measured of a first call"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"offload": "disk"}, "offload is 'disk': use one of auto, none, text, model, group"),
        ({"keys_values": "cpu"}, "keys_values"),
        ({"weights": "int3"}, "use one of native, fp8"),
        ({"feed_forward_tokens": -1}, "feed_forward_tokens"),
        ({"feed_forward_tokens": "many"}, "feed_forward_tokens"),
        ({"limit_gb": 0}, "limit_gb"),
    ],
)
def test_settings_that_cannot_be(wrong, message):
    with pytest.raises(UserError, match=re.escape(message)):
        Memory(**wrong)


def test_without_a_gpu_there_is_nowhere_to_move_models_to():
    with pytest.raises(UserError, match="use none or text"):
        list(Memory(offload="model").ways(on_gpu=False))
