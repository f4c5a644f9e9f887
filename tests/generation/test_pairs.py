"""Training pairs: what they hold, that nothing is made twice, and that training reads them."""

from __future__ import annotations

import hashlib
import json
import signal
import time
from dataclasses import replace
from pathlib import Path

import commands
import pytest
import torch
from hydra import compose, initialize_config_dir
from rich.console import Console
from small_runs import Stop
from training_runs import ROOT, SMALL_BASE, overrides

from scale_dit.data.cache import CachedLatents
from scale_dit.data.encoding import reduce_pictures
from scale_dit.data.generated_pairs import GeneratedPairs
from scale_dit.data.sources import open_photos
from scale_dit.errors import UserError
from scale_dit.generation import Job, PairSettings, Picture, Sampling, generate
from scale_dit.method import Method
from scale_dit.models.settings import BaseSettings
from scale_dit.picture_files import load_picture
from scale_dit.pipeline import ScaleDiTPipeline
from scale_dit.planning.memory import Memory
from scale_dit.resuming import MAKE_PAIRS, resume_pictures
from scale_dit.training import train

ALONE = Method(scale=1.0, windowed=False, guidance=False, order="raster")
PROMPTS = ["a large red circle on sand", "a large red circle on sand", "a small blue star"]
PICTURES = [Picture(index, prompt, "", index, 128, 128) for index, prompt in enumerate(PROMPTS)]
SAMPLING = Sampling(steps=2, scale=1.0)
SETTINGS = PairSettings((4.0, 2.0))


def make(base: BaseSettings, folder: Path, pairs: PairSettings = SETTINGS, **options) -> list[Path]:
    return generate(PICTURES, base, ALONE, SAMPLING, folder, pairs=pairs, console=Console(quiet=True), **options)


def content(folder: Path) -> dict[str, str]:
    """Digests of what training reads, and of the pictures' pixels: their metadata say how long they took."""
    files = [folder / "metadata.jsonl", *sorted((folder / "encoded").iterdir())]
    pixels = {file.name: load_picture(file).numpy().tobytes() for file in sorted(folder.glob("*.png"))}
    found = {file.name: file.read_bytes() for file in files} | pixels
    return {name: hashlib.sha256(data).hexdigest() for name, data in found.items()}


@pytest.fixture(scope="module")
def folder(small_settings, tmp_path_factory) -> Path:
    """Pairs of an undisturbed run."""
    folder = tmp_path_factory.mktemp("pairs")
    assert len(make(small_settings, folder)) == 3
    return folder


def test_pairs_are_the_base_s_own(folder, small_settings):
    """Latents are those that the base made, and the drafts the reductions of its pictures."""
    pipeline = ScaleDiTPipeline.from_pretrained(small_settings.path, settings=small_settings)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.method = ALONE
    for scale in SETTINGS.scales:
        cached = CachedLatents(folder / "encoded", scale)
        assert [each.caption for each in cached.records] == PROMPTS
        for picture, pair in zip(PICTURES, cached, strict=True):
            latents = pipeline(
                picture.prompt, 128, 128, num_inference_steps=2, scale=1.0, output_type="latent",
                generator=torch.Generator().manual_seed(picture.seed),
            ).images  # fmt: skip
            assert torch.equal(pair["latents"], latents[0])
            decoded = pipeline.decode(latents)
            draft = pipeline.base.encode_images(reduce_pictures(decoded, scale))
            assert torch.equal(pair["guidance_latents"], draft[0])
            text = pipeline.base.encode_prompts([picture.prompt])
            assert torch.equal(pair["text"]["tokens"], text.tokens[0])
            assert torch.equal(pair["text"]["pooled"], text.pooled[0])
            assert (load_picture(folder / pair["name"]) / 255 - decoded[0]).abs().max() < 0.51 / 255
    assert torch.equal(cached.text("")["tokens"], pipeline.base.encode_prompts([""]).tokens[0])
    assert not list((folder / "latents").glob("*"))


def test_the_folder_is_one_of_photographs_too(folder):
    source = open_photos(folder)
    assert list(source.captions) == PROMPTS


@pytest.mark.parametrize(("module", "call"), [("FluxTransformerBlock", 7), ("Decoder", 2), ("Encoder", 3)])
def test_an_interrupted_run_is_the_undisturbed_one(folder, small_settings, tmp_path, module, call):
    """In the middle of sampling, of decoding, and between a picture's drafts."""
    with Stop(module, call, KeyboardInterrupt()), pytest.raises(SystemExit):
        make(small_settings, tmp_path)
    with pytest.raises(UserError, match="not all made yet"):
        GeneratedPairs(tmp_path, small_settings, Method())
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "encoded").glob("shard*")}
    make(small_settings, tmp_path)
    assert content(tmp_path) == content(folder)
    assert all(file.stat().st_mtime_ns == time for file, time in before.items()), "made twice"


def test_a_damaged_or_lost_pair_is_made_again_and_no_other(folder, small_settings, tmp_path):
    make(small_settings, tmp_path)
    shards = sorted((tmp_path / "encoded").glob("shard*"))
    shards[0].write_bytes(shards[0].read_bytes()[:100])
    shards[2].unlink()
    kept = shards[1].stat().st_mtime_ns
    with pytest.raises(UserError, match=r"missing or damaged.*make_pairs.py resume="):
        GeneratedPairs(tmp_path, small_settings, Method())
    make(small_settings, tmp_path, job=Job(resume=True))
    assert content(tmp_path) == content(folder)
    assert shards[1].stat().st_mtime_ns == kept


def test_dropped_text_encoders_leave_the_same_pairs(folder, small_settings, tmp_path):
    pictures = [replace(picture, negative_prompt="blur") for picture in PICTURES]
    both = {"offload": Memory(offload="text"), "none": Memory(offload="none")}
    for name, memory in both.items():
        generate(pictures, small_settings, ALONE, SAMPLING, tmp_path / name, pairs=SETTINGS, memory=memory,
                 console=Console(quiet=True))  # fmt: skip
    assert content(tmp_path / "offload") == content(tmp_path / "none")


@pytest.mark.slow
def test_processes_share_the_pairs(folder, small_settings, tmp_path):
    running = [commands.context().Process(target=make, args=(small_settings, tmp_path)) for _ in range(2)]
    for process in running:
        process.start()
    for process in running:
        process.join()
    assert [process.exitcode for process in running] == [0, 0]
    assert content(tmp_path) == content(folder)


def test_training_reads_pairs_and_encodes_nothing(folder, small_folder, tmp_path):
    options = overrides(small_folder, "data=pairs", f"data.path={folder}", "trainer.max_steps=2")
    options = [option for option in options if not option.startswith("data.count")]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("train", overrides=[*options, f"paths.output_dir={tmp_path}"])
    with Stop("Encoder", 1, AssertionError("a picture was encoded")):
        metrics, objects = train(config)
    assert objects["trainer"].global_step == 2
    assert metrics["train/loss"] > 0


@pytest.mark.slow
def test_a_killed_command_goes_on(small_folder, tmp_path):
    """The command itself, killed between two pairs, and taken up with the folder alone."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a large red circle on sand\na small blue star\n")
    base = ["base=tiny", f"base.path={small_folder}", *SMALL_BASE, "device=cpu"]

    def first(folder: str) -> list[str]:
        folders = f"output={tmp_path / folder}", f"hydra.run.dir={tmp_path / folder}_log"
        return [*base, f"prompts_file={prompts}", "n=3", "save_every=1", *folders]

    whole = commands.start("make_pairs.py", *first("whole"))
    killed = commands.start("make_pairs.py", *first("killed"))
    while not list((tmp_path / "killed" / "encoded").glob("shard-00001*")):
        assert killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait().returncode == -signal.SIGKILL
    assert whole.wait().returncode == 0
    assert len(list((tmp_path / "killed" / "encoded").glob("shard*"))) < 6
    resumed = commands.run("make_pairs.py", f"resume={tmp_path / 'killed'}", f"hydra.run.dir={tmp_path}/killed_log")
    assert resumed.returncode == 0, resumed.stderr
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    assert not list((tmp_path / "killed").rglob(".*.part"))


def test_pairs_that_do_not_fit_are_refused(folder, small_settings, tmp_path):
    with pytest.raises(UserError, match=r"no training pairs in .*make_pairs.py prompts_file="):
        GeneratedPairs(tmp_path, small_settings, Method())
    with pytest.raises(UserError, match=r"data.path=<folder>"):
        GeneratedPairs(None, small_settings, Method())
    with pytest.raises(UserError, match=r"px a token: 16 in the pairs, 32 now"):
        GeneratedPairs(folder, replace(small_settings, token_size=32), Method())
    with pytest.raises(UserError, match=r"drafts 8 times smaller are not among them \(scale=4 or scale=2\)"):
        GeneratedPairs(folder, small_settings, Method(scale=8))
    with pytest.raises(UserError, match=r"most tokens of a draft: None in the pairs, 2 now"):
        GeneratedPairs(folder, small_settings, Method(guidance_tokens=2))
    tiny = replace(small_settings, name="tiny", path=str(ROOT / "assets/tiny-flux"))
    with pytest.raises(UserError, match="another base than 'tiny'"):
        GeneratedPairs(folder, tiny, Method())
    with pytest.raises(UserError, match="batch_size is 0"):
        GeneratedPairs(folder, small_settings, Method(), batch_size=0)
    with pytest.raises(UserError, match="built for something else: scales"):
        make(small_settings, folder, PairSettings((4.0,)), job=Job(resume=True))


@pytest.mark.parametrize("scales", [(), (0.5,), ("4",)])
def test_scales_that_cannot_be(scales):
    with pytest.raises(UserError, match="scales is"):
        PairSettings(scales)


def test_each_program_goes_on_in_its_own_folders(tmp_path):
    record = {"config": {"scales": [4]}, "overrides": ["base=tiny"]}
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert resume_pictures([f"resume={tmp_path}"], MAKE_PAIRS)[0] == "base=tiny"
    with pytest.raises(UserError, match=r"another program: python src/make_pairs.py resume="):
        resume_pictures([f"resume={tmp_path}"])
