"""Making pictures: load the base once, then draft, refine, decode and write one after the other."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from scale_dit.device import choose_device
from scale_dit.errors import UserError
from scale_dit.generation.claims import Claims
from scale_dit.generation.contact_sheet import check_against_sheet, write_contact_sheet
from scale_dit.generation.disk import writing
from scale_dit.generation.files import TILED, Files
from scale_dit.generation.folder import OutputFolder
from scale_dit.generation.job import Job
from scale_dit.generation.loras import Loras
from scale_dit.generation.maker import Making, Workshop
from scale_dit.generation.pairs import PairFolder, PairMaking, PairSettings
from scale_dit.generation.photo import DraftPhoto
from scale_dit.generation.pictures import Picture, Sampling
from scale_dit.generation.progress import DECODE_STEPS, GenerationProgress
from scale_dit.generation.remake import Remake
from scale_dit.generation.remaking import Remaking
from scale_dit.generation.setup import Setup
from scale_dit.method import Method
from scale_dit.models.settings import BaseSettings
from scale_dit.planning.memory import Memory
from scale_dit.planning.run import RunPlan
from scale_dit.regions import share_of_boxes
from scale_dit.run_folder import RECORD
from scale_dit.run_record import add_resumption, write_run_record

INTERRUPTED_STATUS = 130


def generate(
    pictures: Sequence[Picture],
    base: BaseSettings,
    method: Method,
    sampling: Sampling,
    output: str | Path,
    *,
    loras: Loras | None = None,
    photo: DraftPhoto | None = None,
    remake: Remake | None = None,
    job: Job | None = None,
    files: Files | None = None,
    backend: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    overwrite: bool = False,
    memory: Memory | None = None,
    pairs: PairSettings | None = None,
    config: dict[str, Any] | None = None,
    console: Console | None = None,
) -> list[Path]:
    """Make pictures and write them as files whose metadata says what they were made with.

    What an interrupted run with the same settings left, pictures and latents, is not made again.

    Args:
        pictures: All of the run, whatever part of them this call makes.
        loras: The base's own LoRA and others; by default none.
        output: Folder of the pictures.
        photo: A picture to use instead of drafts.
        remake: Windows of a finished picture that are all that is made.
        job: Which stages, of which pictures; by default all.
        files: How pictures and latents are written.
        overwrite: Remove the pictures of an earlier run from it, once for all processes of this one.
        memory: How memory is saved; by default as far as it has to be.
        pairs: Keep each picture as a training pair as well.
        config: The resolved config, left in `run.json` beside the pictures and in their metadata.

    Returns:
        The files of the job's pictures that are there, in their order, or the contact sheet of the drafts.

    Raises:
        UserError: Settings, a LoRA, a device or a folder that cannot be, before weights are loaded; a full disk, or
            no memory left.
        SystemExit: Ctrl-C, after a message that says how to go on.
    """
    console, job = console or Console(), job or Job()
    sampling.check(base)
    setup = Setup(
        base, method, sampling, loras or Loras(), photo, backend, *choose_device(device, dtype), memory or Memory(),
        remake,
    )  # fmt: skip
    if remake is not None:
        remake.check(pictures, Path(output), files or Files(), job, photo)
        for picture in pictures:
            remake.chosen(setup.recipe(picture).plan.layout, base.token_size)
    files = files or Files()
    folder = OutputFolder(Path(output), setup.settings(), files, config, setup.decoding)
    if pairs is not None:
        folder = PairFolder.of(folder, pairs, base, pictures)
    selected, plan = job.select(pictures), None
    if overwrite:
        _check_overwriting(folder, job, photo)
        plan = _plan(setup, selected, job)  # nothing is removed for pictures that cannot be made
        folder.clear(pictures)
    if job.stage == "refine":
        check_against_sheet(folder, selected)
    pending = folder.pending(selected, job.goes_on, rewrites=job.stage == "decode")
    _record(folder, pictures[0].seed, len(selected) - len(pending), job)
    if len(pending) < len(selected):
        console.print(f"{len(selected) - len(pending)} of {len(selected)} pictures are there already")
    pending = _with_work(pending, folder, sampling.steps_of(base), job.stage, console)
    if pending and job.stage in ("all", "refine"):
        setup.warn_of_unread_draft()
    if pending:
        if plan is None or pending != selected:
            plan = _plan(setup, pending, job)
        if plan is not None:
            plan.show(console)
        _make_all(setup, plan, pending, folder, job, console)
        if plan is not None:
            plan.show_actual(console)
    if job.stage == "draft":
        return [write_contact_sheet(folder, pictures)]
    there = [picture for picture in selected if _is_made(picture, job.stage, folder)]
    if there == selected and (job.pick is not None or all(folder.file(each).is_file() for each in pictures)):
        folder.finish(pictures)
    return [folder.file(picture) for picture in there]


def _plan(setup: Setup, pictures: Sequence[Picture], job: Job) -> RunPlan | None:
    """Decoding alone is not planned."""
    return None if job.stage == "decode" else setup.plan(pictures, job.stage == "draft")


def _check_overwriting(folder: OutputFolder, job: Job, photo: DraftPhoto | None) -> None:
    """Nothing that is needed, and no picture that is not made again, is removed.

    Raises:
        UserError: Not all pictures are made, or the draft is a picture in the folder.
    """
    if job.pick is not None:
        raise UserError(
            f"overwrite=true removes all pictures of {folder.path}, but pick={job.pick} makes only some again: "
            "leave one of the two out, or remove those pictures' files by hand"
        )
    if photo is not None and photo.path.resolve().is_relative_to(folder.path.resolve()):
        raise UserError(
            f"overwrite=true would remove the draft {photo.path} with the other pictures of {folder.path}: choose "
            "another folder (output=...)"
        )


def _with_work(
    pictures: Sequence[Picture], folder: OutputFolder, steps: int, stage: str, console: Console
) -> list[Picture]:
    """The pictures for which a stage has anything to do, so that no weights are loaded for nothing."""
    if stage == "draft":
        return [picture for picture in pictures if not folder.draft_file(picture).is_file()]
    if stage != "decode":
        return list(pictures)
    options = folder.files.options(folder.decoding)
    if not pictures:
        exact = "; what was decoded exactly is not decoded in tiles" if folder.decoding.mode == TILED else ""
        _say(
            console,
            f"Nothing is left to decode with {' '.join(options)}{exact}. For other files give another format=, "
            "quality= or memory.decode=",
        )
    finished = [picture for picture in pictures if folder.finished(picture, "refine", steps) is not None]
    left_out = [picture for picture in pictures if picture not in finished]
    missing = [str(picture.index) for picture in left_out if not folder.holds(picture)]
    if missing:
        _say(console, f"pictures without finished latents are left out: {', '.join(missing)}. Make them with:")
        _say(console, f"  {folder.resume_command(*options)}")
    if len(missing) < len(left_out):
        _say(console, folder.left_as_they_are([each for each in left_out if str(each.index) not in missing]))
    return finished


def _say(console: Console, text: str) -> None:
    """Print a line whose brackets are no markup and whose commands can be copied."""
    console.print(text, markup=False, soft_wrap=True)


def _make_all(
    setup: Setup, plan: RunPlan | None, pictures: Sequence[Picture], folder: OutputFolder, job: Job, console: Console
) -> None:
    """Load the base and make pictures.

    Raises:
        SystemExit: Ctrl-C.
    """
    pipeline = setup.load_decoder() if plan is None else setup.load(plan, folder.texts)
    work = [_work(setup, picture, job.stage) for picture in pictures]
    interrupted = False
    try:
        with interrupted_by_termination(), GenerationProgress(work, console) as progress:
            workshop = Workshop(pipeline, setup.sampling, folder, progress.step, setup.photo)
            with Claims(folder.path) as claims:
                for picture in pictures:
                    _make(_making(workshop, setup, picture), job.stage, claims, progress, plan)
    except KeyboardInterrupt:
        interrupted = True
    if interrupted:
        _say(console, "Interrupted; every step is saved. Go on with:")
        _say(console, f"  {folder.go_on_command(*([] if job.stage == 'all' else [f'stage={job.stage}']))}")
        sys.exit(INTERRUPTED_STATUS)


def _making(workshop: Workshop, setup: Setup, picture: Picture) -> Making:
    if setup.remake is not None:
        return Remaking(workshop, picture, setup.remake)
    return (PairMaking if isinstance(workshop.folder, PairFolder) else Making)(workshop, picture)


def _make(making: Making, stage: str, claims: Claims, progress: GenerationProgress, plan: RunPlan | None) -> None:
    """Do a picture's stages, unless another process does them or did."""
    picture, folder = making.picture, making.folder
    if not claims.take(picture.index):
        progress.skip()
        return
    if _is_made(picture, stage, folder):
        claims.release(picture.index)
        progress.skip()
        return
    progress.begin()
    if stage == "draft":
        making.draft()
    elif stage == "decode":
        making.decode()
    else:
        making.refine_and_decode()
    claims.release(picture.index)
    making.pipeline.maybe_free_model_hooks()
    if plan is not None and making.is_whole(stage):
        plan.note(picture, making.cost.seconds, making.cost.peak_bytes)
    progress.end()


def _is_made(picture: Picture, stage: str, folder: OutputFolder) -> bool:
    """Whether a stage has nothing to do for a picture any more, such as since another process did it."""
    if stage == "draft":
        return folder.draft_file(picture).is_file()
    return folder.is_as_asked(picture) if stage == "decode" else folder.holds(picture)


@contextmanager
def interrupted_by_termination() -> Iterator[None]:
    """Take a request to end, as clusters send it, for Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _record(folder: OutputFolder, seed: int, there: int, job: Job) -> None:
    """Leave the run record; a command that goes on adds itself to it, one that makes drafts says anew what there is."""
    config = dict(folder.settings if folder.config is None else folder.config)
    with writing(folder):
        if job.goes_on and job.stage != "draft" and (folder.path / RECORD).is_file():
            add_resumption(folder.path, config, seed, there)
        else:
            write_run_record(folder.path, config, seed)


def _work(setup: Setup, picture: Picture, stage: str) -> Mapping[str, float]:
    """Tokens times steps of each stage of one picture; a photo that stands for the draft takes no steps."""
    recipe = setup.recipe(picture)
    layout, draft = recipe.plan.layout, recipe.draft_plan.layout
    refine_step, draft_step = layout.text + layout.image.tokens, draft.text + draft.image.tokens
    drafts = recipe.needs_draft and setup.photo is None
    drafting = {"draft": float(recipe.draft_steps * draft_step)} if drafts else {}
    if stage == "draft":
        return {**drafting, "decode": DECODE_STEPS * draft_step}
    if stage == "decode":
        return {"decode": DECODE_STEPS * refine_step}
    if setup.remake is not None:
        share = share_of_boxes(setup.remake.chosen(layout, setup.base.token_size), layout)
        return {"refine": share * recipe.steps * refine_step, "decode": DECODE_STEPS * refine_step}
    return {**drafting, "refine": recipe.steps * refine_step, "decode": DECODE_STEPS * refine_step}
