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
        pick: Numbers of pictures, as the contact sheet shows them; `None`: all.
        shard: `i/n`: the i-th of n equal parts, from 1 on.
        resume: Whether it goes on in the folder of an earlier command.

    Raises:
        UserError: An unknown stage, or a shard that cannot be.
    """

    stage: str = "all"
    pick: Sequence[int] | None = None
    shard: str | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise UserError(f"unknown stage {self.stage!r}: use one of {', '.join(STAGES)}")
        _ = self._shard

    @property
    def goes_on(self) -> bool:
        """Whether pictures of an earlier command in the folder are what is expected."""
        return self.resume or self.shard is not None or self.stage in ("refine", "decode")

    def select(self, pictures: Sequence[Item]) -> list[Item]:
        """The pictures that it is about.

        Raises:
            UserError: A number that no picture has.
        """
        chosen = range(len(pictures)) if self.pick is None else sorted(set(self.pick))
        wrong = [number for number in chosen if not 0 <= number < len(pictures)]
        if wrong or not chosen:
            problem = f"there is no picture {wrong[0]}" if wrong else "no picture is named"
            raise UserError(
                f"pick={list(self.pick or [])}: {problem}; they are numbered from 0 to "
                f"{len(pictures) - 1}, as the contact sheet shows"
            )
        part, parts = self._shard
        return [pictures[number] for number in chosen if number % parts == part]

    @property
    def _shard(self) -> tuple[int, int]:
        """The part's number from 0 on, and how many there are."""
        if self.shard is None:
            return 0, 1
        match = re.fullmatch(r"(\d+)/(\d+)", str(self.shard))
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise UserError(f"shard is {self.shard!r}, but it must be i/n with i from 1 to n, such as shard=1/4")
        return int(match[1]) - 1, int(match[2])
