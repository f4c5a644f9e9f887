"""Training of the LoRA with a real trainer on the small base: what is learnt, kept, resumed and refused."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import lightning
import pytest
import torch
from lightning_runs import Losses, fit, loss_of

from scale_dit.data.captions import caption
from scale_dit.data.encoding import encode_batch
from scale_dit.data.render import render
from scale_dit.data.scene_sampling import sample_scene
from scale_dit.errors import UserError
from scale_dit.lightning import ScaleDiTModule
from scale_dit.lora import LoraSettings, lora_state, read_lora
from scale_dit.method import Method
from scale_dit.models.settings import BaseSettings
from scale_dit.optimisers import build_optimiser
from scale_dit.pipeline import ScaleDiTPipeline

METHOD = Method(scale=2)


@pytest.fixture
def make(small_settings: BaseSettings):
    """A module on the small base."""

    def make_module(method: Method = METHOD, rank: int = 4, scope: str = "guidance", **options):
        torch.manual_seed(3)
        lora = LoraSettings(rank, rank, scope)
        return ScaleDiTModule(small_settings, method, lora, **{"learning_rate": 3e-3, "warmup": 5} | options)

    return make_module


@pytest.fixture(scope="module")
def batches(small_settings: BaseSettings) -> list[dict]:
    """Two pictures a batch, rendered and encoded as training does it."""
    torch.manual_seed(0)
    base = ScaleDiTModule(small_settings, METHOD, LoraSettings(4, 4)).base
    scenes = [sample_scene(seed) for seed in range(8)]
    pictures, captions = render(scenes, 128, 128), [caption(scene, scene.seed) for scene in scenes]
    return [
        encode_batch(pictures[i : i + 2], captions[i : i + 2], base.encode_images, base.encode_prompts, METHOD.scale)
        for i in range(0, 8, 2)
    ]


def test_the_loss_falls_on_one_batch(make, batches):
    module = make(rank=8, learning_rate=1e-2)
    frozen = {name: p.clone() for name, p in module.transformer.named_parameters() if ".lora_" not in name}
    before = loss_of(module, batches[0]).item()
    losses = Losses()
    fit(module, batches[:1], steps=30, callbacks=[losses])
    assert len(losses.values) == 30
    assert loss_of(module, batches[0]).item() < 0.8 * before
    assert sum(losses.values[-10:]) < 0.85 * sum(losses.values[:10])
    for name, parameter in module.transformer.named_parameters():
        assert parameter.requires_grad == (".lora_" in name)
        assert name not in frozen or torch.equal(parameter, frozen[name])


def test_the_loss_is_that_of_flow_matching(make, batches):
    """x_t = (1-t) x_0 + t eps and target eps - x_0, worked backwards from what the model was given and gave."""
    module, calls = make(caption_dropout=0.0), []
    run = module.base.image_pass

    def recorded(*given):
        calls.append((given, run(*given)))
        return calls[-1][1]

    module.base.image_pass = recorded
    losses = [loss_of(module, batches[0], seed).item() for seed in range(60)]
    plan = module.plan_for(128, 128)
    clean = module.base.pack(batches[0]["latents"], plan.layout.image_order)
    for loss, ((noisy, _, time, *_), velocity) in zip(losses, calls, strict=True):
        t = time.view(-1, 1, 1)
        eps = (noisy - (1 - t) * clean) / t
        assert eps.std().item() == pytest.approx(1, abs=0.05)
        assert loss == pytest.approx((velocity - (eps - clean)).square().mean().item(), rel=1e-3)
    logits = torch.cat([given[2] for given, _ in calls]).logit()
    assert logits.mean().item() == pytest.approx(0, abs=0.3)  # t = sigmoid(normal), 120 of them
    assert logits.std().item() == pytest.approx(1, abs=0.25)


def test_noise_differs_between_steps_and_epochs_and_repeats_with_the_seed(make, batches):
    runs = []
    for global_seed, own_seed in ((1, 0), (2, 0), (3, 1)):
        module = make(seed=own_seed)
        drawn, loss = [], module.loss
        module.loss = lambda batch, generator, drawn=drawn, loss=loss: (
            drawn.append(generator.initial_seed()) or loss(batch, generator)
        )
        torch.manual_seed(global_seed)
        fit(module, batches, steps=9, accumulate_grad_batches=1)
        runs.append(drawn)
    assert len(set(runs[0])) == 9, "the second epoch has the same batches, but other noise"
    assert runs[0] == runs[1], "the state of torch does not matter"
    assert not set(runs[0]) & set(runs[2])


@pytest.mark.parametrize("optimiser", ["adamw", "prodigy"])
def test_resumed_training_equals_uninterrupted_to_the_bit(make, batches, tmp_path: Path, optimiser):
    rate = {"learning_rate": 1.0 if optimiser == "prodigy" else 3e-3}
    whole, first, second = (make(optimiser=optimiser, **rate) for _ in range(3))
    fit(whole, batches, steps=6)
    trainer = fit(first, batches, steps=6, callbacks=[StopAfter(3, tmp_path / "half.ckpt")])
    assert trainer.global_step == 3
    torch.manual_seed(99)
    fit(second, batches, steps=6, ckpt_path=tmp_path / "half.ckpt")
    halfway, wanted, resumed = (lora_state(module.transformer) for module in (first, whole, second))
    assert all(torch.equal(wanted[key], resumed[key]) for key in wanted)
    assert not any(torch.equal(wanted[key], halfway[key]) for key in wanted)


class StopAfter(lightning.Callback):
    """Saves and stops in the middle of an epoch."""

    def __init__(self, step: int, path: Path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def test_a_checkpoint_holds_the_lora_and_plain_values_only(make, batches, tmp_path: Path):
    module = make()
    trainer = fit(module, batches, steps=2)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["state_dict"].keys() == lora_state(module.transformer).keys()
    assert all(".lora_" in key for key in checkpoint["state_dict"])
    weights = sum(value.numel() * value.element_size() for value in checkpoint["state_dict"].values())
    assert (tmp_path / "last.ckpt").stat().st_size < 3 * weights + 200_000  # weights and AdamW's two moments
    assert checkpoint["scale_dit"]["base"] == "small"
    assert checkpoint["hyper_parameters"]["optimiser"] == "adamw"
    assert not {"base", "method", "lora"} & set(checkpoint["hyper_parameters"])


def test_checkpoints_of_another_base_or_rank_are_refused(make, batches, small_settings, tmp_path: Path):
    trainer = fit(make(), batches, steps=1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(UserError, match=r"trained with rank 4, but now rank is 8: set lora.rank=4"):
        fit(make(rank=8), batches, steps=2, ckpt_path=tmp_path / "last.ckpt")
    other = ScaleDiTModule(replace(small_settings, name="other"), METHOD, LoraSettings(4, 4))
    with pytest.raises(UserError, match=r"trained with base 'small', but now base is 'other': set base=small"):
        fit(other, batches, steps=2, ckpt_path=tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    state.pop("x_embedder.lora_A.weight")
    with pytest.raises(UserError, match=r"1 are missing \(x_embedder.lora_A.weight\)"):
        make().load_state_dict(state)


def test_the_exported_lora_is_what_the_pipeline_loads(make, batches, small_folder: Path, tmp_path: Path):
    module = make(export=str(tmp_path / "lora"))
    fit(module, batches, steps=3)
    tensors, record = read_lora(tmp_path / "lora")
    assert all(torch.equal(tensors[key], value) for key, value in lora_state(module.transformer).items())
    assert record == module.record | {"alpha": 4, "lora_scope": "guidance"}
    pipeline = ScaleDiTPipeline.from_pretrained(small_folder)
    pipeline.load_lora_weights(tmp_path / "lora")
    over = ScaleDiTPipeline.over(module.base, METHOD)
    pictures = [
        each("a circle", 256, 256, generator=torch.Generator().manual_seed(0), output_type="latent").images
        for each in (pipeline, over)
    ]
    assert torch.equal(*pictures)
    over.load_lora_weights(tmp_path / "lora")  # in the place of the one that the base came with
    again_drawn = over("a circle", 256, 256, generator=torch.Generator().manual_seed(0), output_type="latent").images
    assert torch.equal(again_drawn, pictures[0])
    again = make(initial_lora=str(tmp_path / "lora"))
    assert all(torch.equal(value, tensors[key]) for key, value in lora_state(again.transformer).items())
    with pytest.raises(UserError, match=r"has rank 4, but the LoRA to train has rank 8: set lora.rank=4"):
        make(rank=8, initial_lora=str(tmp_path / "lora"))


def test_sampling_during_training_leaves_the_gradients_as_they_were(make, batches):
    module = make()
    over = ScaleDiTPipeline.over(module.base, METHOD)
    over("a circle", 256, 256, generator=torch.Generator().manual_seed(0), output_type="latent")
    loss_of(module, batches[0]).backward()
    assert all(p.grad is not None for name, p in module.transformer.named_parameters() if ".lora_B" in name)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (Method(scale=2, guidance=False, windowed=False), {"scope": "all"}),
        (Method(scale=2, shift_windows=True), {"gradient_checkpointing": True}),
        (Method(scale=2), {"dtype": "bfloat16"}),
    ],
)
def test_ablations_train(make, batches, method, options):
    module = make(method=method, **options)
    before = {key: value.clone() for key, value in lora_state(module.transformer).items()}
    losses = Losses()
    fit(module, batches, steps=3, callbacks=[losses])
    assert all(torch.isfinite(torch.tensor(losses.values)))
    changed = {key for key, value in lora_state(module.transformer).items() if not torch.equal(value, before[key])}
    assert changed == set(before)
    assert next(iter(lora_state(module.transformer).values())).dtype == torch.float32


def test_gradient_checkpointing_and_accumulation_run_the_same_numbers(make, batches):
    states = []
    for options in ({}, {"gradient_checkpointing": True}):
        module = make(**options)
        fit(module, batches, steps=2, accumulate_grad_batches=2)
        states.append(lora_state(module.transformer))
    for key in states[0]:
        torch.testing.assert_close(states[0][key], states[1][key], rtol=0, atol=1e-5)


def test_dropped_captions_are_the_empty_text_for_the_image_pass_alone(make, batches):
    module = make(caption_dropout=1.0)
    image, guidance = [], []
    for calls, name in ((image, "image_pass"), (guidance, "guidance_pass")):
        run = getattr(module.base, name)
        setattr(module.base, name, lambda *given, calls=calls, run=run: calls.append(given) or run(*given))
    loss_of(module, batches[0])
    assert torch.equal(image[0][1].tokens, module.empty_text.tokens.expand(2, -1, -1))
    assert torch.equal(image[0][1].pooled, module.empty_text.pooled.expand(2, -1))
    assert torch.equal(guidance[0][1], batches[0]["text"]["pooled"])
    kept = make(caption_dropout=0.0)
    kept.empty_text = module.empty_text
    text = kept._drop_captions(type(image[0][1])(**batches[0]["text"]), torch.Generator())
    assert torch.equal(text.tokens, batches[0]["text"]["tokens"])


def test_a_batch_for_another_scale_is_refused_not_cut(make, batches):
    with pytest.raises(ValueError, match="16 tokens, but the plan is for 4"):
        fit(make(method=Method(scale=4)), batches, steps=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float8"}, "unknown dtype 'float8': use one of float32, bfloat16"),
        ({"caption_dropout": 1.5}, "caption_dropout is 1.5"),
        ({"method": Method(window=3)}, "Window 3 must be a multiple of the cell"),
        ({"method": Method(guidance=False)}, "nothing to train: set method.guidance=true, or lora=all_tokens"),
        ({"initial_lora": "nowhere.safetensors"}, "does not exist"),
    ],
)
def test_what_cannot_be_is_refused_before_weights_are_loaded(make, monkeypatch, options, message):
    monkeypatch.setattr("scale_dit.lightning.load_family", lambda _: pytest.fail("weights were loaded"))
    with pytest.raises(UserError, match=message):
        make(**options)


def test_optimisers_by_name():
    weight = [torch.nn.Parameter(torch.ones(2))]
    assert isinstance(build_optimiser("adamw", weight, 1e-3), torch.optim.AdamW)
    assert type(build_optimiser("prodigy", weight, 1.0)).__name__ == "Prodigy"
    with pytest.raises(UserError, match="optimiser 'lion' is unknown; choose one of adamw, prodigy"):
        build_optimiser("lion", weight, 1.0)


def test_learning_rate_warms_up_and_ends_small(make, batches):
    module = make()
    rates = []

    class Rates(lightning.Callback):
        def on_train_batch_start(self, trainer, *_):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    fit(module, batches, steps=30, callbacks=[Rates()])
    peak = 3e-3  # the warm-up of 5 steps is cut to a tenth of the run
    assert rates[0] == pytest.approx(peak / 3)
    assert max(rates) == pytest.approx(peak)
    assert rates.index(max(rates)) in (2, 3)
    assert rates[-1] < 0.05 * peak
    assert all(later <= earlier for earlier, later in pairwise(rates[3:]))
