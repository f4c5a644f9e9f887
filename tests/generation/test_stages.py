"""What is taken up, picked or shared is the same picture, bit by bit, as in one undisturbed run."""

from __future__ import annotations

import io
import json
import multiprocessing
import resource
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from small_bases import noise
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from scale_dit.errors import UserError
from scale_dit.generation import Files, Job, Loras, Picture, Sampling, generate
from scale_dit.generation.claims import Claims
from scale_dit.generation.latents import SavedLatents
from scale_dit.generation.photo import DraftPhoto
from scale_dit.generation.setup import Setup
from scale_dit.method import Method
from scale_dit.models.settings import BaseSettings
from scale_dit.picture_files import load_picture, read_provenance
from scale_dit.pipeline import ScaleDiTPipeline
from scale_dit.planning.memory import Memory

METHOD = Method(order="hilbert")
PICTURES = [Picture(index, "a large red circle on sand", "", index, 128, 256) for index in range(4)]
SAMPLING = Sampling(steps=4, draft_steps=2)


@pytest.fixture
def make(small_settings, tmp_path):
    """Runs `generate` in a folder below `tmp_path`."""

    def run(folder: str, pictures=PICTURES[:1], sampling=SAMPLING, stage="all", pick=None, resume=False, **options):
        files = Files(
            **{name: options.pop(name) for name in ("format", "save_every", "keep_latents") if name in options}
        )
        job = Job(stage, pick, options.pop("shard", None), resume)
        return generate(
            pictures, small_settings, METHOD, sampling, tmp_path / folder, job=job, files=files,
            **{"console": Console(quiet=True), **options},
        )  # fmt: skip

    return run


@pytest.fixture(scope="module")
def whole(small_settings, tmp_path_factory):
    """The pictures of an undisturbed run, by number."""
    folder = tmp_path_factory.mktemp("whole")
    files = generate(PICTURES, small_settings, METHOD, SAMPLING, folder, console=Console(quiet=True))
    return [load_picture(file) for file in files]


class Stop:
    """Raises an error in a call of a module of one class, through a hook of torch."""

    def __init__(self, module: str, call: int, error: BaseException):
        self.module, self.left, self.error = module, call, error

    def __call__(self, module: nn.Module, arguments: object) -> None:
        if type(module).__name__ == self.module and not next(module.parameters()).is_meta:  # plans run on `meta`
            self.left -= 1
            if self.left == 0:
                raise self.error

    def __enter__(self):
        self.handle = register_module_forward_pre_hook(self)

    def __exit__(self, *error: object):
        self.handle.remove()


BLOCK = "FluxTransformerBlock"
CALLS_OF_DRAFT = 2 * 2 * 2
"""Blocks, steps and branches."""
CALLS_OF_GUIDANCE = 2


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


def test_kept_latents_are_decoded_again_into_another_format(make, tmp_path, whole):
    make("out", keep_latents=True)
    (file,) = make("out", stage="decode", format="webp", keep_latents=True)
    assert file.name == "00000_seed0.webp"
    assert torch.equal(load_picture(file), whole[0])
    provenance = read_provenance(file)
    assert provenance is not None
    assert provenance["prompt"] == PICTURES[0].prompt
    assert set(provenance["seconds"]) == {"decode"}


def test_a_damaged_picture_is_made_again(make, tmp_path, whole):
    (file,) = make("out")
    file.write_bytes(file.read_bytes()[:3000])
    (again,) = make("out", resume=True)
    assert torch.equal(load_picture(again), whole[0])
    assert read_provenance(again) is not None


def test_nothing_is_loaded_where_a_stage_has_nothing_to_do(make):
    console = Console(file=io.StringIO(), width=200)
    assert make("out", stage="decode", console=console) == []
    assert "pictures without finished latents are left out: 0" in console.file.getvalue()
    make("drafts", stage="draft", console=console)
    assert "picture 1/1" in console.file.getvalue()
    console = Console(file=io.StringIO(), width=200)
    make("drafts", stage="draft", console=console)
    assert "picture 1/1" not in console.file.getvalue()


def test_decoding_reads_the_autoencoder_alone(small_folder, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(small_folder, folder)
    pipeline = ScaleDiTPipeline.from_pretrained(folder)
    for part in ("transformer", "text_encoder", "text_encoder_2"):
        for weights in (folder / part).glob("*.safetensors"):
            weights.unlink()
    setup = Setup(
        BaseSettings.of(str(folder)), METHOD, SAMPLING, Loras(), None, "auto", torch.device("cpu"), torch.float32,
        Memory(),
    )  # fmt: skip
    latents = noise(1, 16, 16, 32)
    found = torch.cat(list(setup.load_decoder().decode_bands(latents)), dim=1)
    assert torch.equal(found, torch.cat(list(pipeline.decode_bands(latents)), dim=1))


def test_other_weights_are_other_settings(small_settings, small_folder, tmp_path):
    """The transformer's file by what is in it, not by its name; weights in 8 bits make other pictures."""
    setup = Setup(
        small_settings, METHOD, SAMPLING, Loras(), None, "auto", torch.device("cpu"), torch.float32, Memory()
    )  # fmt: skip
    (weights,) = (small_folder / "transformer").glob("*.safetensors")
    file = shutil.copy(weights, tmp_path / "one.safetensors")
    given = replace(setup, base=replace(small_settings, transformer_file=str(file)))
    before = given.settings()
    state = load_file(file)
    state[min(state)] += 1
    save_file(state, file)
    after = given.settings()
    assert before["base"] == after["base"]
    assert before != after
    assert replace(setup, memory=Memory(weights="fp8")).settings() != setup.settings()
    assert replace(setup, memory=Memory("group", 4096, "host", "tiled")).settings() == setup.settings()


def test_picked_drafts_become_the_pictures_of_a_full_run(make, tmp_path, whole):
    (sheet,) = make("out", PICTURES, stage="draft")
    with Image.open(sheet) as image:
        assert image.size[0] > 2 * 256
    listed = json.loads((tmp_path / "out" / "contact_sheet.json").read_text())
    assert [(each["index"], each["seed"]) for each in listed] == [(0, 0), (1, 1), (2, 2), (3, 3)]
    previews = [load_picture(tmp_path / "out" / each["draft"]) for each in listed]
    assert not torch.equal(previews[0], previews[1])
    assert not list(tmp_path.glob("out/0*")), "no picture is made"
    with Stop(BLOCK, 2 * (CALLS_OF_GUIDANCE + 4 * 4) + 1, AssertionError("a draft is made twice")):
        files = make("out", PICTURES, stage="refine", pick=[3, 1])
    assert [file.name for file in files] == ["00001_seed1.png", "00003_seed3.png"]
    assert torch.equal(load_picture(files[0]), whole[1])
    assert torch.equal(load_picture(files[1]), whole[3])
    (more,) = make("out", PICTURES, stage="refine", pick=0)
    assert torch.equal(load_picture(more), whole[0])
    lines = (tmp_path / "out" / "pictures.jsonl").read_text().splitlines()
    assert [json.loads(line)["seed"] for line in lines] == [0, 1, 3]
    make("out", [*PICTURES, replace(PICTURES[0], index=4, seed=4)], stage="draft")
    assert len(json.loads((tmp_path / "out" / "contact_sheet.json").read_text())) == 5, "more drafts to choose from"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": "sketch"}, "unknown stage 'sketch': use one of all, draft, refine, decode"),
        ({"pick": [4]}, "there is no picture 4; they are numbered from 0 to 3"),
        ({"pick": []}, "no picture is named"),
        ({"pick": "3;7"}, "pick is '3;7', but it must be a list of numbers"),
        ({"shard": "3/2"}, "shard is '3/2'"),
        ({"shard": "0/2"}, "such as shard=1/4"),
        ({"format": "gif"}, "unknown format 'gif'"),
    ],
)
def test_what_cannot_be_is_refused(make, options, message):
    with pytest.raises(UserError, match=message):
        make("out", PICTURES, **options)


def test_shards_are_equal_parts_of_a_list(make, tmp_path, whole):
    first = make("out", PICTURES, shard="1/2")
    assert not (tmp_path / "out" / "pictures.jsonl").exists(), "the run is not finished"
    second = make("out", PICTURES, shard="2/2")
    assert [file.name[:5] for file in (*first, *second)] == ["00000", "00002", "00001", "00003"]
    assert torch.equal(load_picture(second[1]), whole[3])
    assert len((tmp_path / "out" / "pictures.jsonl").read_text().splitlines()) == 4
    assert make("out", PICTURES, shard="2/2") == second, "a late part finds its work done"
    for shard in ("1/2", "2/2"):
        again = make("out", PICTURES, shard=shard, overwrite=True)
    assert again == second
    assert (tmp_path / "out" / "pictures.jsonl").is_file(), "the second part leaves the first one's pictures"


@pytest.mark.parametrize(("sampling", "warns"), [(SAMPLING, True), (replace(SAMPLING, start=0.7), False)])
def test_a_draft_that_nothing_reads_is_warned_of(make, caplog, sampling, warns):
    make("out", sampling=sampling)
    assert ("no LoRA that teaches" in caplog.text) == warns


def test_overwriting_removes_nothing_that_is_needed(make, tmp_path):
    kept = make("out", PICTURES[:2])
    photo = DraftPhoto(kept[1])
    for options, message in (
        ({"pick": [1]}, r"removes all pictures of .*out, but pick=\[1\] makes only some"),
        ({"photo": photo}, "would remove the draft .*00001"),
        ({"memory": Memory(limit_gb=0.001)}, "needs"),
    ):
        with pytest.raises(UserError, match=message):
            make("out", PICTURES[:2], overwrite=True, **options)
        assert all(file.is_file() for file in (*kept, tmp_path / "out" / "pictures.jsonl"))


def test_drafts_of_another_prompt_are_not_shown_as_new_ones(make):
    make("drafts", PICTURES[:1], stage="draft")
    other = replace(PICTURES[0], prompt="another")
    with pytest.raises(UserError, match=r"another prompt.*overwrite=true"):
        make("drafts", [other], stage="draft")


def hold_claim(folder: Path, taken, wait) -> None:
    with Claims(folder) as claims:
        taken.put(claims.take(1))
        wait.wait()


def test_a_claim_is_one_processes_and_dies_with_it(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    taken = context.SimpleQueue()
    other = context.Process(target=hold_claim, args=(tmp_path, taken, context.Event()))
    other.start()
    assert taken.get()
    with Claims(tmp_path) as claims:
        assert claims.take(0)
        assert not claims.take(1)
        other.kill()
        other.join()
        assert claims.take(1), "a killed process keeps nothing"


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
