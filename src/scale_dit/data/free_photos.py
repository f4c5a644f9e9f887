"""Fetch genuine photographs with free licences from Debian packages: `make photos`.

    python -m scale_dit.data.free_photos --output data/photos

The pictures are not part of this repository. `free_photos.json` lists them with package, path, sha256, licence, author
and a caption. The result is a folder for `open_photos`: `train/` and `test/` with a `metadata.jsonl` each, and the
packages' copyright files under `licences/`. Needs Debian or Ubuntu, but no root: `apt-get download` and `dpkg-deb -x`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from scale_dit.errors import UserError
from scale_dit.files import sha256_of, write_atomically

MANIFEST = Path(__file__).with_suffix(".json")


@dataclass(frozen=True)
class FreePhoto:
    """One line of the manifest; `path` is inside the package, sizes are in bytes and pixels."""

    package: str
    path: str
    sha256: str
    bytes: int
    width: int
    height: int
    licence: str
    author: str
    caption: str
    split: str

    @property
    def file_name(self) -> str:
        """In the folder of its split."""
        return Path(self.path).name


def read_manifest(path: Path = MANIFEST) -> list[FreePhoto]:
    """The photographs that `fetch` can bring."""
    return [FreePhoto(**line) for line in json.loads(path.read_text(encoding="utf-8"))["photos"]]


def fetch(output: Path, photos: list[FreePhoto], debs: Path | None = None) -> list[str]:
    """Bring the photographs that are not there yet, and write captions, authors and licences beside all that are.

    Args:
        output: folder to fill.
        photos: from `read_manifest`.
        debs: folder of packages that were downloaded already, instead of `apt-get download`.

    Returns:
        One line for each photograph that could not be had: its name and why.

    Raises:
        UserError: neither the tools nor the pictures are there, or none could be had.
    """
    problems: list[str] = []
    for package in dict.fromkeys(photo.package for photo in photos):
        wanted = [photo for photo in photos if photo.package == package and not _is_there(output, photo)]
        if not wanted:
            continue
        _require_tools(with_apt=debs is None)
        with tempfile.TemporaryDirectory() as scratch:
            try:
                _unpack(_deb(package, debs, Path(scratch)), Path(scratch, "root"))
            except _UnavailableError as failure:
                problems += [f"{photo.file_name}: {failure}" for photo in wanted]
                continue
            problems += [line for photo in wanted if (line := _take(Path(scratch, "root"), output, photo))]
            notice = Path(scratch, "root", "usr", "share", "doc", package, "copyright")
            write_atomically(output / "licences" / f"{package}.txt", notice.read_bytes())
    present = [photo for photo in photos if _is_there(output, photo)]
    if not present:
        raise UserError("none of the photographs could be had:\n  " + "\n  ".join(problems))
    _write_metadata(output, present)
    return problems


def main(arguments: list[str] | None = None) -> int:
    """Command line; 0 if every photograph is there, 1 if some are missing, 2 if none could be had."""
    parser = argparse.ArgumentParser(prog="python -m scale_dit.data.free_photos", description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to fill, for example data/photos")
    parser.add_argument("--debs", type=Path, help="folder of already downloaded .deb files, instead of apt-get")
    options = parser.parse_args(arguments)
    photos = read_manifest()
    try:
        problems = fetch(options.output, photos, options.debs)
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{len(photos) - len(problems)} of {len(photos)} photographs are in {options.output}")
    for photo in photos:
        if _is_there(options.output, photo):
            print(
                f"  {photo.split}/{photo.file_name}: {photo.author}, {photo.licence} (Debian package {photo.package})"
            )
    for problem in problems:
        print(f"missing: {problem}", file=sys.stderr)
    return 1 if problems else 0


class _UnavailableError(Exception):
    """One package or picture that could not be had."""


def _is_there(output: Path, photo: FreePhoto) -> bool:
    path = output / photo.split / photo.file_name
    return path.is_file() and sha256_of(path) == photo.sha256


def _require_tools(with_apt: bool) -> None:
    missing = [tool for tool in ("apt-get", "dpkg-deb")[0 if with_apt else 1 :] if shutil.which(tool) is None]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} not found: this step takes the photographs out of Debian packages, so it needs "
            f"Debian or Ubuntu (a container will do). On another machine use any folder of your own pictures instead"
        )


def _deb(package: str, debs: Path | None, scratch: Path) -> Path:
    folder = scratch
    if debs is None:
        _run(["apt-get", "download", package], scratch, "apt-get update may help")
    else:
        folder = debs
    found = sorted(folder.glob(f"{package}_*.deb"))
    if not found:
        raise _UnavailableError(f"no {package}_*.deb in {folder}")
    return found[-1].resolve()


def _unpack(deb: Path, root: Path) -> None:
    _run(["dpkg-deb", "-x", str(deb), str(root)], deb.parent, "download the package again")


def _run(command: list[str], folder: Path, remedy: str) -> None:
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise _UnavailableError(f"{' '.join(command[:2])} failed ({last}); {remedy}")


def _take(root: Path, output: Path, photo: FreePhoto) -> str | None:
    """Copy one photograph out of an unpacked package; why not, if not."""
    source = root / photo.path
    if not source.is_file():
        return f"{photo.file_name}: this version of {photo.package} does not hold {photo.path}"
    data = source.read_bytes()
    if hashlib.sha256(data).hexdigest() != photo.sha256:
        return f"{photo.file_name}: this version of {photo.package} holds another picture (sha256 differs)"
    write_atomically(output / photo.split / photo.file_name, data)
    return None


def _write_metadata(output: Path, photos: list[FreePhoto]) -> None:
    for split in dict.fromkeys(photo.split for photo in photos):
        lines = [
            json.dumps(
                {
                    "file_name": photo.file_name,
                    "caption": photo.caption,
                    "author": photo.author,
                    "licence": photo.licence,
                    "source": f"Debian package {photo.package}, {photo.path}",
                },
                ensure_ascii=False,
            )
            for photo in photos
            if photo.split == split
        ]
        write_atomically(output / split / "metadata.jsonl", ("\n".join(lines) + "\n").encode())


if __name__ == "__main__":
    sys.exit(main())
