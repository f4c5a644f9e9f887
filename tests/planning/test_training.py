"""The memory plan of training against steps that really run, and what is refused with which remedies."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_bases import add_random_lora, noise, random_text
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from training_runs import training_config

from scale_dit.errors import UserError
from scale_dit.flow_matching import flow_matching_loss
from scale_dit.lora import LoraSettings
from scale_dit.method import Method
from scale_dit.models import load_family
from scale_dit.planning import training_run
from scale_dit.planning.components import Components
from scale_dit.planning.trace import trace
from scale_dit.planning.training import TrainingPlan
from scale_dit.training import build, train

METHOD = Method(order="hilbert")
BATCH = 2
CPU = torch.device("cpu")


@pytest.fixture
def plan(small_settings) -> TrainingPlan:
    return TrainingPlan(small_settings, METHOD, LoraSettings(rank=4, alpha=4), ((128, 128),), BATCH, CPU, "sdpa")


@pytest.fixture
def base(small_settings):
    driver = load_family(small_settings).load(small_settings, backend="sdpa")
    driver.freeze()
    add_random_lora(driver, rank=4)
    return driver


def real_loss(base, scale: float = 1.0) -> torch.Tensor:
    layouts = METHOD.plan(base.settings, 128, 128)
    clean, draft, eps = (
        noise(BATCH, count, 4 * base.latent_channels, seed=count)
        for count in (layouts.layout.image.tokens, layouts.layout.guidance_tokens, layouts.layout.image.tokens)
    )
    text = random_text(BATCH, base.transformer)
    return flow_matching_loss(base, layouts, clean, draft, text, text, eps, torch.full((BATCH,), 0.5), scale)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_those_that_torch_saves(plan, base, checkpointing):
    """Every tensor that autograd keeps behind a real forward pass, each storage once, weights left out."""
    base.gradient_checkpointing = checkpointing
    weights = {parameter.untyped_storage().data_ptr() for parameter in base.transformer.parameters()}
    saved: dict[int, int] = {}
    kept = []  # so that no address is used twice

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
            kept.append(storage)
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        loss = real_loss(base)
    loss.backward()
    traced = replace(plan, gradient_checkpointing=checkpointing).forward_trace()
    if checkpointing:  # what is recomputed saves through hooks of its own, which hide from these
        assert traced.kept < 0.5 * plan.forward_trace().kept
    else:
        assert traced.kept == pytest.approx(sum(saved.values()), rel=0.05)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("backend", ["sdpa", "masked"])
def test_peak_is_that_of_a_real_step(plan, base, backend, checkpointing):
    base.gradient_checkpointing, base.backend = checkpointing, backend
    real_loss(base)  # index tables are cached
    real = trace(lambda: real_loss(base).backward(), "cpu", gradients=True)
    predicted = replace(plan, backend=backend, gradient_checkpointing=checkpointing).parts["activations and gradients"]
    assert predicted == pytest.approx(real.peak, rel=0.1)


def test_states_are_counted_number_by_number(plan, base):
    trained = [parameter for parameter in base.transformer.parameters() if parameter.requires_grad]
    numbers = sum(parameter.nbytes for parameter in trained)
    everything = [base.transformer, base.pipeline.vae]  # text encoders are gone before the first step
    weights = sum(each.nbytes for part in everything for each in (*part.parameters(), *part.buffers())) - numbers
    assert plan.parts["weights of the base"] == weights
    assert plan.parts["LoRA and its average"] == 2 * numbers
    assert plan.parts["states of adamw"] == 2 * numbers
    optimiser = torch.optim.AdamW(trained)
    real_loss(base).backward()
    optimiser.step()
    states = sum(state.nbytes for each in optimiser.state.values() for state in each.values() if state.ndim)
    assert states == 2 * numbers
    assert replace(plan, averaged=False).parts["LoRA"] == numbers
    assert replace(plan, optimiser="prodigy").parts["states of prodigy"] == 4 * numbers


def test_text_encoders_count_before_the_first_step_alone(plan, base):
    texts = sum(each.nbytes for part in base.text_encoders.values() for each in (*part.parameters(), *part.buffers()))
    before = "text encoders, before the first step"
    rest = sum(count for name, count in plan.parts.items() if name != before)
    assert plan.parts[before] == max(0, texts + plan.parts["weights of the base"] - rest), "all is loaded into the host"
    assert replace(plan, device=torch.device("cuda")).parts[before] == 0, "they go before the transformer comes"


def test_autocast_is_that_of_a_gpu():
    """Linear layers in its precision, norms and losses in float32; trained weights are cast once."""
    layer = torch.nn.Linear(8, 8, bias=False, device="meta")
    norm = torch.nn.LayerNorm(8, elementwise_affine=False)
    dtypes = []

    def code() -> list[torch.Tensor]:
        first = layer(torch.empty(4, 8, device="meta"))
        second = norm(first)
        third = layer(second)
        dtypes.extend([first.dtype, second.dtype, functional.mse_loss(third, third).dtype])
        return [third]

    once = trace(code, gradients=True, autocast=torch.bfloat16)
    assert dtypes == [torch.bfloat16, torch.float32, torch.float32]
    casts = [each for each, count in once.operations.items() if each.bytes == 8 * 8 * (4 + 2) for _ in range(count)]
    assert len(casts) == 1


def test_autocast_saves_memory(plan):
    half = replace(plan, autocast=torch.bfloat16)
    assert half.peak < 0.9 * plan.peak


def test_what_does_not_fit_names_what_does(plan):
    way = replace(plan, batch_size=4, backend="masked")
    checkpointed = replace(way, gradient_checkpointing=True)
    with pytest.raises(UserError, match=r"4 pictures of 128 x 128 px needs .* with model.gradient_checkpointing=true$"):
        way.check(checkpointed.peak)
    smaller = replace(checkpointed, batch_size=2)
    options = "data.batch_size=2 trainer.accumulate_grad_batches=2"
    with pytest.raises(UserError, match=f"with model.gradient_checkpointing=true {options}$"):
        way.check(smaller.peak)
    with pytest.raises(UserError, match=r"still .*data.batch_size=1.*weights of the base.*base.native="):
        way.check(1000)
    way.check(way.peak)


def test_the_largest_picture_decides(plan):
    found = replace(plan, sizes=((128, 128), (64, 64))).parts
    assert found == pytest.approx(plan.parts, rel=0.01), "but for what Python has not collected yet"


def test_training_is_planned_and_refused_before_weights(small_folder, tmp_path, monkeypatch, capsys):
    _, objects = train(training_config(small_folder, tmp_path / "fits", "trainer.max_steps=2"))
    printed = capsys.readouterr().out
    assert printed.count("Memory of a training step: 2 pictures of 128") == 2
    assert "actual (the whole process)" in printed
    monkeypatch.setattr(training_run, "free_bytes", lambda device: 10**5)
    monkeypatch.setattr(type(objects["model"].base), "load", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(UserError, match=r"a training step with 2 pictures of 128 x 128 px needs"):
        build(training_config(small_folder, tmp_path / "small"))


def test_full_size_flux_without_weights():
    """A batch of one at 1024 px on FLUX.1-dev in bfloat16: what the command of the README trains."""
    from full_size import flux1_dev

    from scale_dit.models.settings import BaseSettings

    def found(checkpointing: bool, blocks: tuple[int, int]) -> dict[str, int]:
        components: Components = flux1_dev(blocks)
        return TrainingPlan(
            BaseSettings(name="flux1_dev"), METHOD, LoraSettings(), ((1024, 1024),), 1, CPU, "triton",
            dtype=torch.bfloat16, gradient_checkpointing=checkpointing, autocast=torch.bfloat16, components=components,
        ).parts  # fmt: skip

    one, two = (found(True, (1, blocks))["activations and gradients"] for blocks in (1, 2))
    kept = (4096 + 512) * 3072 * 2
    assert two - one == pytest.approx(kept, rel=0.5), "a checkpointed block keeps its input, and the draft's keys"
    assert found(False, (1, 2))["activations and gradients"] > two
