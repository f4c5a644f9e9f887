"""What is to be made: prompts, seeds and sizes, and how they are sampled; checked before any weight is loaded."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scale_dit.errors import UserError
from scale_dit.generation.numbers import check_number
from scale_dit.generation.photo import DraftPhoto
from scale_dit.generation.prompts import LARGEST_SEED, Prompt, read_prompts
from scale_dit.local_control import WindowPrompt
from scale_dit.method import Method
from scale_dit.models.settings import BaseSettings
from scale_dit.recipe import Recipe, native_scale
from scale_dit.sampling import LowPass, check_sampling
from scale_dit.wrapping import check_wrap

log = logging.getLogger(__name__)

SMALLEST_TILE = 64


@dataclass(frozen=True)
class Sampling:
    """How pictures are sampled; `None` is the base's own. See `ScaleDiTPipeline.__call__`.

    Args:
        steps, draft_steps: Of the refinement and of the draft.
        guidance_scale, draft_guidance_scale: Of the refinement and of the draft.
        start: Noise level at which refinement starts: 1 is pure noise, below it the upsampled and noised draft.
        low_pass, low_pass_schedule, low_pass_until: The pull of low frequencies towards the draft, see
            `scale_dit.sampling.LowPass`; 0 is off.
        scale: HR side / draft side; `None` makes the draft as large as the base's native size.
        wrap: Which edges join: `none`, `horizontal` or `both`.
        decode_tile: Side in px of the tiles of the decode mode `tiled`.

    Raises:
        UserError: Something is no number that has to be one.
    """

    steps: int | None = None
    draft_steps: int | None = None
    guidance_scale: float | None = None
    draft_guidance_scale: float | None = None
    start: float = 1.0
    low_pass: float = 0.0
    low_pass_schedule: str = "cosine"
    low_pass_until: float = 0.0
    scale: float | None = None
    wrap: str = "none"
    decode_tile: int = 1024

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name not in ("low_pass_schedule", "wrap"):
                check_number(name, value, whole=name in ("steps", "draft_steps", "decode_tile"))

    def check(self, base: BaseSettings) -> None:
        """Refuse what sampling would refuse, before weights are loaded.

        Raises:
            UserError: Steps, a start, a guidance scale or a tile that cannot be.
        """
        check_sampling(base, self.start, self.steps, self.draft_steps, self.guidance_scale, self.draft_guidance_scale)
        _ = self.pull
        check_wrap(self.wrap)
        if self.decode_tile < SMALLEST_TILE:
            raise UserError(f"decode_tile is {self.decode_tile} px, but it must be at least {SMALLEST_TILE}: try 1024")

    def steps_of(self, base: BaseSettings) -> int:
        """Steps of the refinement."""
        return base.steps if self.steps is None else self.steps

    def scale_for(self, base: BaseSettings, height: int, width: int) -> float:
        """HR side / draft side for a picture of `height` x `width` px."""
        return native_scale(base, height, width) if self.scale is None else self.scale

    @property
    def pull(self) -> LowPass:
        """The pull of low frequencies.

        Raises:
            UserError: Values that cannot be.
        """
        return LowPass(self.low_pass, self.low_pass_schedule, self.low_pass_until)

    def recipe(self, base: BaseSettings, method: Method, height: int, width: int) -> Recipe:
        """The recipe for pictures of `height` x `width` px.

        Raises:
            UserError: A size, scale or window that cannot be, with what can.
        """
        return Recipe.of(
            base, method, height, width, scale=self.scale, steps=self.steps, draft_steps=self.draft_steps,
            guidance_scale=self.guidance_scale, draft_guidance_scale=self.draft_guidance_scale, start=self.start,
            low_pass=self.pull, wrap=self.wrap,
        )  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """One picture to make: everything about it that may differ from its neighbours; sizes in px."""

    index: int
    prompt: str
    negative_prompt: str
    seed: int
    height: int
    width: int
    window_prompts: tuple[WindowPrompt, ...] = ()

    @property
    def stem(self) -> str:
        """The name of its files in the output folder, without suffix."""
        return f"{self.index:05d}_seed{self.seed}"


def collect_prompts(prompt: str | Sequence[str] | None, prompts_file: str | Path | None) -> list[Prompt]:
    """Prompts of the command line or of a file; lines of the file that cannot be used are named in warnings.

    Raises:
        UserError: Neither or both are given, or there is no prompt to use.
    """
    if prompt is not None and prompts_file is not None:
        raise UserError("both prompt and prompts_file are given: leave one of them out")
    if prompts_file is not None:
        found = read_prompts(prompts_file)
        for line in found.broken:
            log.warning("left out: %s", line)
        if found.unknown_fields:
            log.warning("%s: nothing reads %s", prompts_file, ", ".join(found.unknown_fields))
        return found.prompts
    texts = [prompt] if isinstance(prompt, str) else list(prompt or [])
    if not texts or not all(text.strip() for text in texts):
        raise UserError("no prompt is given, or an empty one: give prompt='...' or prompts_file=...")
    return [Prompt(text) for text in texts]


def collect_pictures(
    prompts: Sequence[Prompt],
    base: BaseSettings,
    method: Method,
    sampling: Sampling,
    *,
    n: int = 1,
    seed: int = 0,
    height: int | None = None,
    width: int | None = None,
    negative_prompt: str | None = None,
    window_prompts: Sequence[WindowPrompt] = (),
    photo: DraftPhoto | None = None,
) -> list[Picture]:
    """Every picture to make; a line of a file whose size cannot be is left out with a warning.

    Args:
        n: Pictures of each prompt, with consecutive seeds.
        seed, height, width, negative_prompt, window_prompts: For prompts that say nothing of their own. Sizes in px;
            `None` is `scale` (or the method's) times the base's native side.
        photo: A picture that stands for the drafts; sizes are of its aspect.

    Raises:
        UserError: `n`, or a size given for all, cannot be; or nothing is left to make.
    """
    for name, value in (("n", n), ("seed", seed), ("height", height), ("width", width)):
        check_number(name, value, whole=True)
    if not 0 <= seed <= LARGEST_SEED:
        raise UserError(f"seed is {seed}, but it must be from 0 to {LARGEST_SEED}")
    if n < 1:
        raise UserError(f"n is {n}, but every prompt needs at least one picture: set n=1 or more")
    side = round(base.native * (sampling.scale or method.scale))
    default = (side, side) if photo is None else photo.fitting_size(base, side)
    pictures: list[Picture] = []
    for prompt in prompts:
        size = (
            next(given for given in (prompt.height, height, default[0]) if given is not None),
            next(given for given in (prompt.width, width, default[1]) if given is not None),
        )
        windows = tuple(window_prompts if prompt.window_prompts is None else prompt.window_prompts)
        try:
            grid = sampling.recipe(base, method, *size).plan.layout.image
            for window in windows:
                window.tokens(grid, base.token_size)
            if photo is not None:
                photo.check_aspect(base, *size)
        except UserError as error:
            if (prompt.height, prompt.width, prompt.window_prompts) == (None, None, None):
                raise
            log.warning("left out: %s: %s", prompt.source, error)
            continue
        negative = negative_prompt or "" if prompt.negative_prompt is None else prompt.negative_prompt
        first = seed if prompt.seed is None else prompt.seed
        pictures += [Picture(len(pictures) + i, prompt.text, negative, first + i, *size, windows) for i in range(n)]
    if not pictures:
        raise UserError("no line of the prompt file can be made by this base: the warnings above say why")
    return pictures


def warn_of_unread_negatives(
    pictures: Sequence[Picture], base: BaseSettings, method: Method, sampling: Sampling, *, drafting: bool = True
) -> None:
    """Say so, once, if pictures have negative prompts that nothing will read.

    Args:
        drafting: Whether the base makes their drafts.
    """
    having = [picture for picture in pictures if picture.negative_prompt.strip()]
    if not having:
        return
    recipe = sampling.recipe(base, method, having[0].height, having[0].width)
    scales = [recipe.guidance_scale, *([recipe.draft_guidance_scale] if drafting and recipe.needs_draft else [])]
    if base.has_negative_branch(*scales):
        return
    unread = f"nothing reads the negative prompt of {len(having)} of {len(pictures)} pictures"
    if base.distilled:
        log.warning(
            "%s: base %s is distilled and has no classifier-free guidance; choose one that has, such as "
            "base=klein_base_4b",
            unread, base.name,
        )  # fmt: skip
    else:
        log.warning(
            "%s: the guidance scale is 1, so there is no classifier-free guidance; give guidance_scale=%g",
            unread, base.guidance_scale if base.guidance_scale != 1 else 4,
        )  # fmt: skip
