"""Prompts to pictures on a small random base, against the stock pipeline on the same folder."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from PIL import Image
from pipelines import PROMPTS, latents_of, seeded, stock_latents
from small_bases import SETTINGS, flux

from scale_dit.errors import UserError
from scale_dit.method import Method
from scale_dit.pipeline import ScaleDiTPipeline


def test_the_draft_is_the_stock_pipelines_picture(pipeline, small_folder: Path):
    stock = DiffusionPipeline.from_pretrained(small_folder)
    assert type(stock) is FluxPipeline
    wanted = stock_latents(
        stock, PROMPTS, 128, 96, seeded(1, 2), num_inference_steps=3, true_cfg_scale=3.0, negative_prompt=["", ""]
    )
    output = pipeline(PROMPTS, 256, 192, scale=2, draft_steps=3, generator=seeded(1, 2), output_type="latent")
    torch.testing.assert_close(output.draft_latents, wanted, rtol=0, atol=1e-4)
    drafts, cost = pipeline.make_drafts(PROMPTS, 256, 192, 2, 3, None, seeded(1, 2))
    assert torch.equal(drafts, output.draft_latents)
    assert set(cost.seconds) == {"text", "draft"}


def test_one_window_without_guidance_is_the_stock_pipeline_from_the_same_noise(pipeline, small_folder: Path):
    pipeline.method = Method(windowed=False, guidance=False, order="raster")
    passes = spy(pipeline, "image_pass")
    ours = latents_of(pipeline, height=208, width=240, num_inference_steps=4)
    noise = passes[0][0]
    wanted = stock_latents(
        FluxPipeline.from_pretrained(small_folder), PROMPTS[0], 208, 240, None, latents=noise,
        num_inference_steps=4, true_cfg_scale=3.0, negative_prompt="",
    )  # fmt: skip
    torch.testing.assert_close(ours, wanted, rtol=0, atol=2e-4)
    pipeline.method = replace(pipeline.method, order="hilbert")
    permuted = latents_of(pipeline, height=208, width=240, num_inference_steps=4)
    torch.testing.assert_close(permuted, wanted, rtol=0, atol=2e-4)


def test_a_distilled_base_takes_the_guidance_scale_as_an_input(small_folder: Path):
    stock = FluxPipeline.from_pretrained(small_folder)
    components = stock.components | {"transformer": flux("distilled")}
    components = {name: part for name, part in components.items() if name not in ("image_encoder", "feature_extractor")}
    pipeline = ScaleDiTPipeline(**components)
    pipeline.configure(replace(SETTINGS, distilled=True, guidance_scale=3.5))
    passes = spy(pipeline, "image_pass")
    output = pipeline(PROMPTS[0], 256, 256, draft_steps=3, generator=seeded(1)[0], output_type="latent")
    stock = FluxPipeline(**components)
    wanted = stock_latents(stock, PROMPTS[0], 128, 128, seeded(1)[0], num_inference_steps=3, guidance_scale=3.5)
    torch.testing.assert_close(output.draft_latents, wanted, rtol=0, atol=1e-4)
    assert len(passes) == 3 + 2


def spy(pipeline: ScaleDiTPipeline, name: str) -> list:
    """Arguments of every call of one of the driver's passes, which runs as ever."""
    calls, run = [], getattr(pipeline.base, name)

    def recorded(*arguments):
        calls.append(arguments)
        return run(*arguments)

    setattr(pipeline.base, name, recorded)
    return calls


def test_one_guidance_pass_serves_all_steps_and_both_branches(pipeline):
    guidance, image = spy(pipeline, "guidance_pass"), spy(pipeline, "image_pass")
    latents_of(pipeline, num_inference_steps=3, draft_steps=2)
    assert len(guidance) == 1
    refinement = [call for call in image if call[4] is not None]
    assert (len(image), len(refinement)) == (2 * (2 + 3), 2 * 3)
    assert len({id(call[4]) for call in refinement}) == 1
    texts = [call[1].tokens for call in refinement[:2]]
    assert not torch.equal(*texts), "the second branch has the negative prompt"
    assert torch.equal(guidance[0][1], refinement[0][1].pooled), "the draft's modulation is the positive prompt's"
    assert not torch.equal(guidance[0][1], refinement[1][1].pooled)
    image.clear()
    latents_of(pipeline, num_inference_steps=3, guidance_scale=1, draft_guidance_scale=1)
    assert len(image) == 2 + 3


def test_a_base_may_refine_at_a_guidance_scale_of_its_own(pipeline):
    pipeline.configure(replace(SETTINGS, refine_guidance_scale=1.0))
    image = spy(pipeline, "image_pass")
    ours = latents_of(pipeline, num_inference_steps=3, draft_steps=2)
    assert len(image) == 2 * 2 + 3, "no second branch in the refinement"
    pipeline.configure(SETTINGS)
    torch.testing.assert_close(ours, latents_of(pipeline, num_inference_steps=3, draft_steps=2, guidance_scale=1.0))
    pipeline.configure(replace(SETTINGS, refine_guidance_scale=1.0))
    pipeline.method = replace(pipeline.method, guidance=False)
    image = spy(pipeline, "image_pass")
    latents_of(pipeline, num_inference_steps=3, draft_steps=2)
    assert len(image) == 2 * 3, "a picture that reads no draft keeps the base's"


def test_output_types(pipeline):
    images = {
        kind: pipeline(PROMPTS, 256, 208, generator=seeded(1, 2), output_type=kind, num_inference_steps=1).images
        for kind in ("pil", "np", "pt", "latent")
    }
    assert images["latent"].shape == (2, 16, 32, 26)
    assert images["pt"].shape == (2, 3, 256, 208)
    assert images["np"].shape == (2, 256, 208, 3)
    assert [image.size for image in images["pil"]] == [(208, 256)] * 2
    assert isinstance(images["pil"][0], Image.Image)
    assert images["pt"].min() >= 0
    assert images["pt"].max() <= 1
    assert images["pt"].std() > 0
    np.testing.assert_array_equal(images["np"], images["pt"].permute(0, 2, 3, 1).numpy())
    np.testing.assert_allclose(np.asarray(images["pil"][1]) / 255, images["np"][1], atol=0.5 / 255 + 1e-6)
    assert torch.equal(pipeline.decode(images["latent"]), images["pt"])


def test_size_defaults_to_scale_times_native_and_costs_are_told(pipeline):
    output = pipeline(PROMPTS[0], output_type="pt", num_inference_steps=1, draft_steps=1)
    assert output.images.shape == (1, 3, 512, 512)
    assert output.draft_latents.shape == (1, 16, 16, 16)
    assert list(output.cost.seconds) == ["text", "draft", "refine", "decode"]
    assert all(seconds > 0 for seconds in output.cost.seconds.values())
    images, drafts, cost = pipeline(
        PROMPTS[0], 256, 256, output_type="latent", num_inference_steps=1, return_dict=False
    )
    assert (images.shape[-1], drafts.shape[-1], list(cost.seconds)) == (32, 16, ["text", "draft", "refine", "decode"])


def test_a_picture_depends_on_its_own_prompt_and_generator_only(pipeline):
    batch = latents_of(pipeline, PROMPTS, generator=seeded(1, 2))
    alone = latents_of(pipeline, PROMPTS[1], generator=seeded(2))
    torch.testing.assert_close(batch[1:], alone, rtol=0, atol=1e-4)
    assert not torch.allclose(batch[:1], alone, atol=1e-2)
    other = latents_of(pipeline, PROMPTS[1], generator=seeded(3))
    assert not torch.allclose(other, alone, atol=1e-2)


def test_one_generator_gives_different_pictures_and_the_same_ones_again(pipeline):
    first = latents_of(pipeline, num_images_per_prompt=2, seed=5)
    assert first.shape[0] == 2
    assert not torch.allclose(first[0], first[1], atol=1e-2)
    assert torch.equal(first, latents_of(pipeline, num_images_per_prompt=2, seed=5))


def test_pictures_of_a_prompt_follow_each_other(pipeline):
    four = latents_of(pipeline, PROMPTS, num_images_per_prompt=2, generator=seeded(1, 2, 3, 4), num_inference_steps=1)
    third = latents_of(pipeline, PROMPTS[1], generator=seeded(3), num_inference_steps=1)
    torch.testing.assert_close(four[2:3], third, rtol=0, atol=1e-4)


def test_a_given_draft_leads_to_the_same_picture(pipeline):
    for start in (1.0, 0.6):
        full = pipeline(PROMPTS[0], 256, 256, generator=seeded(7)[0], start=start, output_type="latent")
        again = latents_of(pipeline, seed=7, start=start, draft_latents=full.draft_latents)
        assert torch.equal(full.images, again)
        other = latents_of(pipeline, seed=7, start=start, draft_latents=full.draft_latents + 1)
        assert not torch.allclose(other, again, atol=1e-3)


@pytest.mark.parametrize(
    ("size", "switches", "options"),
    [
        ((208, 304), {}, {}),
        ((144, 272), {"order": "raster", "halo_cells": 0}, {"start": 0.7}),
        ((272, 144), {"shift_windows": True}, {"low_pass": 0.5}),
        ((256, 256), {"scope": "global", "guidance_tokens": 9}, {"start": 0.5, "low_pass": 0.5}),
        ((256, 208), {"guidance": False}, {}),
        ((256, 208), {"yarn": 2.0}, {"low_pass": 0.5, "low_pass_schedule": "constant", "low_pass_until": 0.6}),
        ((64, 64), {"windowed": False}, {}),
        ((80, 64), {"windowed": False, "guidance": False}, {"start": 0.7}),
    ],
)
def test_any_size_and_switch(pipeline, size, switches, options):
    pipeline.method = Method(**switches)
    output = pipeline(PROMPTS[0], *size, generator=seeded(0)[0], output_type="pt", **options)
    assert output.images.shape == (1, 3, *size)
    assert output.images.isfinite().all()
    if "guidance" in switches and not options:
        assert output.draft_latents is None


def test_order_of_tokens_does_not_show_in_the_picture(pipeline):
    pictures = []
    for order in ("raster", "window", "hilbert"):
        pipeline.method = Method(order=order)
        pictures.append(latents_of(pipeline, height=208, width=272, low_pass=0.5))
    torch.testing.assert_close(pictures[0], pictures[1], rtol=0, atol=1e-4)
    torch.testing.assert_close(pictures[0], pictures[2], rtol=0, atol=1e-4)


def test_callback_of_diffusers_and_progress_of_all_stages(pipeline):
    seen, progress = [], []

    def callback(caller, step, timestep, values):
        seen.append((caller is pipeline, step, float(timestep), tuple(values["latents"].shape)))
        return {"latents": torch.zeros_like(values["latents"])} if step == 1 else values

    latents = latents_of(
        pipeline, num_inference_steps=2, draft_steps=3, callback_on_step_end=callback,
        progress=lambda *step: progress.append(step),
    )  # fmt: skip
    assert seen == [(True, 0, 1000.0, (1, 16, 32, 32)), (True, 1, 500.0, (1, 16, 32, 32))]
    assert torch.equal(latents, torch.zeros(1, 16, 32, 32))
    assert progress == [("draft", i, 3) for i in (1, 2, 3)] + [("refine", i, 2) for i in (1, 2)]


def test_a_callback_that_returns_nothing_changes_nothing(pipeline):
    plain = latents_of(pipeline)
    assert torch.equal(plain, latents_of(pipeline, callback_on_step_end=lambda *_: None))
    assert torch.equal(plain, latents_of(pipeline, callback_on_step_end=lambda *given: given[3]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": []}, "list of prompts is empty"),
        ({"height": 250}, "Height 250 px is not a positive multiple of .* 16 px: use 240 or 256"),
        ({"width": 0}, "Width 0 px"),
        ({"height": 32, "width": 32}, "Window 4 is larger than the picture's grid of 2 x 2 tokens"),
        ({"output_type": "jpeg"}, "unknown output_type 'jpeg': use one of pil, np, pt, latent"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        ({"height": -256}, "Height -256 px"),
        ({"num_inference_steps": 0}, "number of steps is 0"),
        ({"draft_steps": 0}, "number of steps is 0"),
        ({"start": 0.0}, "start is 0.0"),
        ({"guidance_scale": "high"}, "guidance_scale is 'high'"),
        ({"draft_guidance_scale": -1.0}, "draft_guidance_scale is -1.0"),
        ({"scale": 0.5}, "Scale is 0.5"),
        ({"generator": seeded(1, 2, 3)}, "3 generators were given for 1 pictures"),
        (
            {"draft_latents": torch.zeros(2, 16, 16, 16)},
            r"shape \[2, 16, 16, 16\], but 1 pictures need \[1, 16, h, w\]",
        ),
        ({"draft_latents": torch.zeros(1, 64, 64)}, r"need \[1, 16, h, w\]"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_computed(pipeline, changes, message):
    passes = spy(pipeline, "image_pass")
    with pytest.raises(UserError, match=message):
        pipeline(**{"prompt": PROMPTS[0], "height": 256, "width": 256} | changes)
    assert not passes


def test_a_prompt_that_is_cut_is_named_in_one_line(pipeline, caplog, monkeypatch):
    for name in ("diffusers", "transformers"):  # both keep their records to themselves
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    long = "a large red circle on sand, " * 30 + "and a blue star"
    with caplog.at_level(logging.WARNING):
        pipeline.base.pipeline.encode_prompt([long, PROMPTS[0]], max_sequence_length=24)
        assert "<pad>" in caplog.text  # what it would look like
        caplog.clear()
        cut = pipeline.base.encode_prompts([long, PROMPTS[0]])
        assert torch.equal(cut.tokens[1:], pipeline.base.encode_prompts(PROMPTS[:1]).tokens)
    assert [record.name for record in caplog.records] == ["scale_dit.models.parts"]
    assert "reads 24 of this prompt's" in caplog.text
    assert "and a blue star" in caplog.text


def test_yarn_changes_the_picture_and_excludes_ntk(pipeline):
    plain = latents_of(pipeline)
    pipeline.method = Method(yarn=2.0)
    assert not torch.allclose(plain, latents_of(pipeline), atol=1e-3)
    with pytest.raises(UserError, match=r"method.yarn=2.0 exclude"):
        Method(yarn=2.0, ntk=2.0)
    with pytest.raises(UserError, match=r"YaRN factor is 0\.5"):
        Method(yarn=0.5)


def test_a_distilled_base_of_four_steps_makes_a_picture_in_four_steps_a_stage(small_folder: Path):
    pipeline = ScaleDiTPipeline.from_pretrained(small_folder)
    pipeline.configure(replace(SETTINGS, steps=4, shift=1.0, guidance_scale=1.0, distilled=True))
    progress = []
    image = spy(pipeline, "image_pass")
    latents_of(pipeline, progress=lambda *step: progress.append(step))
    assert len(image) == 4 + 4, "no second branch"
    levels = [float(call[2][0]) for call in image]
    assert levels == pytest.approx([1.0, 0.75, 0.5, 0.25] * 2)
    assert progress[-1] == ("refine", 4, 4)
