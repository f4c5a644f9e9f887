"""What a command does of a run: which stages, and of which pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from scale_dit.errors import UserError

STAGES = ("all", "draft", "refine", "decode")

Item = TypeVar("Item")


@dataclass(frozen=True)
class Job:
    """The part of a run that one command does.

    Args:
        stage: `draft`: drafts and a contact sheet; `refine`: pictures, from the drafts that are there; `decode`: only
            pictures whose latents are finished; `all`: everything.
        pick: Numbers of pictures, or one, as the contact sheet shows them; `None`: all.
        shard: `i/n`: the i-th of n equal parts, from 1 on.
        resume: Whether it goes on in the folder of an earlier command.

    Raises:
        UserError: An unknown stage, a shard that cannot be, or a pick that is no list of numbers.
    """

    stage: str = "all"
    pick: Sequence[int] | int | None = None
    shard: str | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise UserError(f"unknown stage {self.stage!r}: use one of {', '.join(STAGES)}")
        _ = self._shard
        picked = self._picked or []
        if isinstance(picked, str) or not all(isinstance(number, int) for number in picked):
            raise UserError(f"pick is {self.pick!r}, but it must be a list of numbers, such as 'pick=[3,7]'")

    @property
    def goes_on(self) -> bool:
        """Whether pictures of an earlier command in the folder are what is expected."""
        return self.resume or self.shard is not None or self.stage != "all"

    def select(self, pictures: Sequence[Item]) -> list[Item]:
        """The pictures that it is about.

        Raises:
            UserError: A number that no picture has.
        """
        chosen = range(len(pictures)) if self._picked is None else sorted(set(self._picked))
        wrong = [number for number in chosen if not 0 <= number < len(pictures)]
        if wrong or not chosen:
            problem = f"there is no picture {wrong[0]}" if wrong else "no picture is named"
            raise UserError(
                f"pick={list(self._picked or [])}: {problem}; they are numbered from 0 to "
                f"{len(pictures) - 1}, as the contact sheet shows"
            )
        part, parts = self._shard
        return [pictures[number] for number in chosen if number % parts == part]

    @property
    def _picked(self) -> Sequence[int] | None:
        return [self.pick] if isinstance(self.pick, int) else self.pick

    @property
    def _shard(self) -> tuple[int, int]:
        """The part's number from 0 on, and how many there are."""
        if self.shard is None:
            return 0, 1
        match = re.fullmatch(r"(\d+)/(\d+)", str(self.shard))
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise UserError(f"shard is {self.shard!r}, but it must be i/n with i from 1 to n, such as shard=1/4")
        return int(match[1]) - 1, int(match[2])
