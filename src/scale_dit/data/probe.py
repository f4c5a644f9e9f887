"""Look at every picture once, before training: which can be read, and how large it is. The answer is kept on disk."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from scale_dit.data.decode import PictureError, open_picture, upright_size, verify
from scale_dit.data.sources import PhotoSource
from scale_dit.files import write_atomically

log = logging.getLogger(__name__)

# Raised whenever decoding changes which pictures can be used.
_FORMAT = 2


@dataclass(frozen=True)
class Probe:
    """What one picture is: upright height and width in pixels, or why it cannot be used."""

    height: int
    width: int
    problem: str | None = None


def default_store() -> Path:
    """`$XDG_CACHE_HOME/scale_dit/probes`, by default below `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "scale_dit", "probes")


def probe_photos(source: PhotoSource, store: Path | None = None, threads: int = 4) -> list[Probe]:
    """Read every picture through once.

    The answer is kept under a name made of the listing with sizes and times of change, so an edited file is probed anew
    (with all others of its source).

    Args:
        source: the pictures.
        store: folder of kept answers; default `default_store()`. One that cannot be written is only a warning.
        threads: that decode at a time.
    """
    kept = (default_store() if store is None else Path(store)) / f"{source.listing(with_times=True)}.json"
    known = _load(kept, len(source))
    if known is not None:
        return known
    with ThreadPoolExecutor(max_workers=threads) as pool:
        probes = list(_report(pool.map(lambda index: probe(source, index), range(len(source))), len(source)))
    try:
        rows = [[item.height, item.width, item.problem] for item in probes]
        write_atomically(kept, json.dumps({"format": _FORMAT, "probes": rows}).encode())
    except OSError as error:
        log.warning("cannot keep the list of readable pictures in %s (%s); the next run reads them again", kept, error)
    return probes


def probe(source: PhotoSource, index: int) -> Probe:
    """Read one picture through."""
    try:
        with open_picture(source.data(index)) as image:
            height, width = upright_size(image)
            verify(image)
            return Probe(height, width)
    except PictureError as error:
        return Probe(0, 0, str(error))


def _load(path: Path, count: int) -> list[Probe] | None:
    if not path.is_file():
        return None
    try:
        kept = json.loads(path.read_text())
        probes = [Probe(*row) for row in kept["probes"]]
    except (ValueError, KeyError, TypeError):
        log.warning("%s is damaged; reading the pictures again", path)
        return None
    return probes if kept.get("format") == _FORMAT and len(probes) == count else None


def _report(probes: Iterator[Probe], count: int, every: int = 2000) -> Iterator[Probe]:
    for done, item in enumerate(probes, start=1):
        if done % every == 0:
            log.info("looked at %d of %d pictures", done, count)
        yield item
