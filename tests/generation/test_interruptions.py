"""What was stopped anywhere goes on from its last step, and ends as the same picture, bit by bit."""

from __future__ import annotations

import resource
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from small_runs import BLOCK, CALLS_OF_DRAFT, CALLS_OF_GUIDANCE, CALLS_OF_STEP, PICTURES, SAMPLING, Stop
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from scale_dit.errors import UserError
from scale_dit.generation.latents import SavedLatents
from scale_dit.picture_files import load_picture, read_provenance


@pytest.mark.parametrize(
    ("steps_done", "sampling"),
    [(0, SAMPLING), (3, SAMPLING), (1, replace(SAMPLING, start=0.7, low_pass=0.5, low_pass_schedule="linear"))],
)
def test_an_interrupted_picture_goes_on_bit_by_bit(make, tmp_path, whole, steps_done, sampling):
    expected = whole[0] if sampling == SAMPLING else load_picture(make("other", sampling=sampling)[0])
    calls = CALLS_OF_DRAFT + CALLS_OF_GUIDANCE + 4 * steps_done + 2
    with Stop(BLOCK, calls, KeyboardInterrupt()), pytest.raises(SystemExit) as stopped:
        make("out", sampling=sampling)
    assert stopped.value.code == 130
    saved = list(tmp_path.glob("out/latents/*.refine.safetensors"))
    assert len(saved) == (steps_done > 0)
    with Stop(BLOCK, CALLS_OF_GUIDANCE + 4 * (4 - steps_done) + 1, AssertionError("a step is made twice")):
        (file,) = make("out", sampling=sampling)
    assert torch.equal(load_picture(file), expected)
    assert not list(tmp_path.glob("out/latents/*")), "what is no longer needed is removed"


@pytest.mark.parametrize("wrap", ["none", "horizontal"])
@pytest.mark.parametrize(("steps_done", "save_every", "saved"), [(2, 5, 2), (3, 2, 2)], ids=["stopped", "killed"])
def test_an_interrupted_draft_goes_on_bit_by_bit(make, tmp_path, wrap, steps_done, save_every, saved):
    sampling = replace(SAMPLING, draft_steps=4, wrap=wrap)
    expected = load_picture(make("undisturbed", sampling=sampling)[0])
    error, left = (
        (KeyboardInterrupt(), SystemExit) if save_every > steps_done else (RuntimeError("killed"), RuntimeError)
    )
    with Stop(BLOCK, CALLS_OF_STEP * steps_done + 2, error), pytest.raises(left):
        make("out", sampling=sampling, save_every=save_every)
    with safe_open(tmp_path / "out" / "latents" / f"{PICTURES[0].stem}.draft.safetensors", "pt") as file:
        assert file.metadata()["step"] == str(saved)
    guidance = CALLS_OF_GUIDANCE * (1 if wrap == "none" else 4)
    calls = CALLS_OF_STEP * (4 - saved) + guidance + CALLS_OF_STEP * 4
    with Stop(BLOCK, calls + 1, AssertionError("a step is made twice")):
        (file,) = make("out", sampling=sampling)
    assert torch.equal(load_picture(file), expected)
    assert not list(tmp_path.glob("out/latents/*"))


def test_steps_are_saved_as_often_as_asked_and_survive_a_kill(make, tmp_path, whole):
    calls = CALLS_OF_DRAFT + CALLS_OF_GUIDANCE + 4 * 3 + 2
    with Stop(BLOCK, calls, RuntimeError("killed")), pytest.raises(RuntimeError):
        make("out", save_every=2)
    latents = SavedLatents(tmp_path / "out" / "latents")
    with pytest.raises(UserError, match="save_every is 0"):
        make("out", save_every=0)
    (file,) = tmp_path.glob("out/latents/*.refine.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    assert latents.load(file.name.removesuffix(".safetensors"), "any") is None
    assert torch.equal(load_picture(make("out")[0]), whole[0]), "damaged latents are made again"


def test_other_settings_do_not_go_on_from_foreign_latents(make, tmp_path):
    calls = CALLS_OF_DRAFT + CALLS_OF_GUIDANCE + 4 * 2 + 2
    with Stop(BLOCK, calls, KeyboardInterrupt()), pytest.raises(SystemExit):
        make("out")
    other = replace(SAMPLING, guidance_scale=2.0)
    with pytest.raises(UserError, match=r"refine.safetensors are steps of other settings.*overwrite=true"):
        make("out", sampling=other)
    alone = load_picture(make("alone", sampling=other)[0])
    assert torch.equal(load_picture(make("out", sampling=other, overwrite=True)[0]), alone)


def test_out_of_memory_in_decode_keeps_the_latents(make, tmp_path, whole):
    with Stop("Decoder", 1, torch.OutOfMemoryError("CUDA out of memory.")), pytest.raises(UserError) as error:
        make("out")
    assert f"python src/generate.py stage=decode memory.decode=tiled resume={tmp_path / 'out'}" in str(error.value)
    with Stop(BLOCK, 1, AssertionError("the transformer is not needed")):
        (file,) = make("out", stage="decode")
    assert torch.equal(load_picture(file), whole[0])


def test_out_of_host_memory_is_said_too(make):
    class TakeAll(Stop):
        def __call__(self, module: nn.Module, arguments: object) -> None:
            if type(module).__name__ == self.module and not next(module.parameters()).is_meta:
                torch.empty(2**55)

    with TakeAll("Decoder", 1, MemoryError()), pytest.raises(UserError, match="out of memory in the stage 'decode'"):
        make("out")


def test_a_picture_that_is_not_finite_is_not_written(make, tmp_path):
    def spoil(module: nn.Module, arguments: object, output: object) -> object:
        spoils = type(module).__name__ == "Decoder" and isinstance(output, torch.Tensor) and not output.is_meta
        return output * float("nan") if spoils else output

    handle = register_module_forward_hook(spoil)
    try:
        with pytest.raises(UserError, match=r"picture 0 holds NaN or infinity.*dtype=float32"):
            make("out")
    finally:
        handle.remove()
    assert not list(tmp_path.glob("out/*.png"))


def test_out_of_memory_in_refinement_says_how_to_go_on(make):
    with Stop(BLOCK, CALLS_OF_DRAFT + 1, torch.OutOfMemoryError("full")), pytest.raises(UserError) as error:
        make("out")
    assert "'refine'" in str(error.value)
    assert "memory=least resume=" in str(error.value)


def test_out_of_memory_in_a_draft_keeps_its_steps(make, tmp_path, whole):
    with Stop(BLOCK, CALLS_OF_STEP + 1, torch.OutOfMemoryError("full")), pytest.raises(UserError) as error:
        make("out")
    assert "out of memory in the stage 'draft'" in str(error.value)
    calls = CALLS_OF_STEP + CALLS_OF_GUIDANCE + 4 * CALLS_OF_STEP
    with Stop(BLOCK, calls + 1, AssertionError("a step is made twice")):
        (file,) = make("out")
    assert torch.equal(load_picture(file), whole[0])


def test_a_damaged_picture_is_made_again(make, tmp_path, whole):
    (file,) = make("out")
    file.write_bytes(file.read_bytes()[:3000])
    (again,) = make("out", resume=True)
    assert torch.equal(load_picture(again), whole[0])
    assert read_provenance(again) is not None


@contextmanager
def largest_file(size: int):
    """As on a full disk: files end at `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_what_goes_on(make, tmp_path, whole):
    # Latents of the picture have 33 kB, the picture itself about 90.
    with largest_file(50_000), pytest.raises(UserError) as error:
        make("out")
    assert "File too large" in str(error.value)
    assert f"resume={tmp_path / 'out'}" in str(error.value)
    assert not list(tmp_path.glob("out/**/*.part")), "nothing half-written is left"
    with Stop(BLOCK, 1, AssertionError("only decoding is left")):
        (file,) = make("out")
    assert torch.equal(load_picture(file), whole[0])


def test_a_disk_too_full_for_latents_says_so(make, tmp_path):
    with largest_file(20_000), pytest.raises(UserError, match="saved steps are kept"):
        make("out")
    assert list(tmp_path.glob("out/latents/*.draft.safetensors"))
