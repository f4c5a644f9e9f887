"""The three readers behind `scale_dit.data.sources.open_photos`. A new kind is one more function in `OPENERS`."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from scale_dit.data.caption_files import METADATA, caption_of, clean, decode_text, parse_json, read_metadata, read_text
from scale_dit.data.sources import PICTURE_ENDINGS, PhotoSource, Skipped, complete_captions, visible_files
from scale_dit.errors import UserError


def open_folder(
    root: Path, caption_field: str | None, image_field: str | None, default_caption: str | None, store: Any
) -> PhotoSource:
    """Pictures in a folder, captioned by `metadata.jsonl` or sidecar `.txt` files."""
    files = visible_files(root)
    pictures = [file for file in files if file.suffix.lower() in PICTURE_ENDINGS]
    listed: dict[Path, str | None] = {}
    for metadata in (file for file in files if file.name == METADATA):
        captions = read_metadata(metadata, caption_field)
        listed |= {metadata.parent / name: caption for name, caption in captions.items()}
    missing = [path for path in listed if not path.is_file()]
    names = [path.relative_to(root).as_posix() for path in pictures]
    found = [listed.get(path) or _sidecar(path) for path in pictures]
    return PhotoSource(
        kind="folder",
        root=root,
        table=_table({"path": [str(path) for path in pictures]}),
        files=pictures,
        names=names,
        captions=complete_captions(names, found, default_caption, root),
        read=_read_path,
        skipped=tuple(Skipped(str(path), f"listed in {METADATA}, but there is no such file") for path in missing),
    )


def open_webdataset(
    root: Path, caption_field: str | None, image_field: str | None, default_caption: str | None, store: Any
) -> PhotoSource:
    """Pictures in tar files, read in place by offset."""
    archives = visible_files(root, ".tar")
    rows: list[dict[str, Any]] = []
    captions: list[str | None] = []
    skipped: list[Skipped] = []
    for number, archive in enumerate(archives):
        place = _place(archive, root)
        pictures, texts, problem = _index_tar(archive, caption_field)
        for key, (offset, size, ending) in pictures.items():
            rows.append({"archive": number, "offset": offset, "size": size, "name": f"{place}/{key}{ending}"})
            captions.append(texts.get(key))
        if problem:
            skipped.append(Skipped(place, f"{problem}; the {len(pictures)} pictures before that are used"))
    names = [row.pop("name") for row in rows]
    return PhotoSource(
        kind="webdataset",
        root=root,
        table=_table({key: [row[key] for row in rows] for key in ("archive", "offset", "size")}),
        files=archives,
        names=names,
        captions=complete_captions(names, captions, default_caption, root),
        read=partial(_read_slice, [str(archive) for archive in archives]),
        skipped=tuple(skipped),
    )


def open_parquet(
    root: Path, caption_field: str | None, image_field: str | None, default_caption: str | None, store: Any
) -> PhotoSource:
    """Parquet files with a picture column and a caption column."""
    import datasets
    import pyarrow.parquet

    files, lengths, skipped = [], [], []
    for file in visible_files(root, ".parquet"):
        try:
            lengths.append(pyarrow.parquet.read_metadata(file).num_rows)
            files.append(file)
        except (OSError, pyarrow.ArrowInvalid) as error:
            skipped.append(Skipped(_place(file, root), f"not a readable parquet file ({' '.join(str(error).split())})"))
    if not files:
        raise UserError(f"no readable parquet file in {root}: {'; '.join(map(str, skipped))}")
    try:
        table = datasets.load_dataset(
            "parquet", data_files=[str(file) for file in files], split="train", cache_dir=str(store) if store else None
        )
    except datasets.exceptions.DatasetGenerationError as error:
        cause = error.__cause__ or error
        raise UserError(f"cannot read the parquet files in {root}: {cause}; all must have the same columns") from error
    image_field = _image_column(table, image_field, root)
    texts = _caption_column(table, caption_field, default_caption, root)
    if isinstance(table.features[image_field], datasets.Image):
        table = table.cast_column(image_field, datasets.Image(decode=False))
    names = [f"{_place(file, root)}:{row}" for file, rows in zip(files, lengths, strict=True) for row in range(rows)]
    return PhotoSource(
        kind="parquet",
        root=root,
        table=table.select_columns([image_field]),
        files=files,
        names=names,
        captions=complete_captions(names, texts, default_caption, root),
        read=partial(_read_column, image_field, str(root if root.is_dir() else root.parent)),
        skipped=tuple(skipped),
    )


def _table(columns: dict[str, list[Any]]) -> Any:
    import datasets

    return datasets.Dataset.from_dict(columns)


def _place(file: Path, root: Path) -> str:
    """A file's name for messages, unique below the root."""
    return file.name if file == root else file.relative_to(root).as_posix()


def _sidecar(picture: Path) -> str | None:
    text = picture.with_suffix(".txt")
    return clean(read_text(text)) if text.is_file() else None


def _index_tar(
    archive: Path, caption_field: str | None
) -> tuple[dict[str, tuple[int, int, str]], dict[str, str], str | None]:
    """(offset, size, ending) and caption by key, and what is wrong with the archive if it breaks off."""
    pictures: dict[str, tuple[int, int, str]] = {}
    texts: dict[str, str] = {}
    records: dict[str, str] = {}
    length = archive.stat().st_size
    try:
        with tarfile.open(archive, "r:") as members:
            for member in members:
                key, ending = _key_and_ending(member.name)
                if not member.isfile() or key is None:
                    continue
                if member.offset_data + member.size > length:
                    raise tarfile.ReadError("unexpected end of data")
                if ending in PICTURE_ENDINGS:
                    if key in pictures:
                        raise UserError(f"{archive}: two pictures with the key {key!r}; give each its own key")
                    pictures[key] = (member.offset_data, member.size, ending)
                elif ending in (".txt", ".json"):
                    text = decode_text(_member_bytes(members, member), f"{archive}/{member.name}")
                    caption = _tar_caption(text, ending, f"{archive}/{member.name}", caption_field)
                    if caption is not None:
                        (texts if ending == ".txt" else records)[key] = caption
    except (tarfile.TarError, EOFError) as error:
        return pictures, records | texts, f"the archive breaks off ({error})"
    return pictures, records | texts, None


def _member_bytes(members: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = members.extractfile(member)
    return stream.read() if stream is not None else b""


def _tar_caption(text: str, ending: str, place: str, caption_field: str | None) -> str | None:
    return clean(text) if ending == ".txt" else caption_of(parse_json(text, place), place, caption_field)


def _key_and_ending(name: str) -> tuple[str | None, str]:
    """The webdataset convention: the key reaches to the first dot of the file's own name."""
    path = PurePosixPath(name)
    if path.name.startswith(".") or "." not in path.name:
        return None, ""
    stem = path.name.split(".", 1)[0]
    return (path.parent / stem).as_posix(), path.suffix.lower()


def _image_column(table: Any, wanted: str | None, root: Path) -> str:
    import datasets

    def holds_pictures(feature: Any) -> bool:
        if isinstance(feature, dict):
            return "bytes" in feature or "path" in feature
        return isinstance(feature, datasets.Image) or getattr(feature, "dtype", "") in ("binary", "large_binary")

    columns = [name for name, feature in table.features.items() if holds_pictures(feature)]
    if wanted is None and len(columns) == 1:
        return columns[0]
    if wanted in columns:
        return str(wanted)
    asked = "say which with image_field=" if wanted is None else f"image_field={wanted!r} is none of them"
    raise UserError(f"{root}: columns that hold pictures: {', '.join(columns) or 'none'}; {asked}")


def _caption_column(table: Any, wanted: str | None, default: str | None, root: Path) -> list[str | None]:
    from scale_dit.data.caption_files import CAPTION_FIELDS

    names = (wanted,) if wanted is not None else CAPTION_FIELDS
    for name in names:
        if name in table.features:
            return [None if text is None else clean(str(text)) for text in table[name]]
    if wanted is None and default is not None:
        return [None] * len(table)
    raise UserError(
        f"{root}: no caption column {' or '.join(map(repr, names))}; columns: {', '.join(table.features)}; "
        f"name one with caption_field=, or set default_caption"
    )


def _read_path(row: dict[str, Any]) -> Path:
    return Path(row["path"])


def _read_slice(archives: list[str], row: dict[str, Any]) -> bytes:
    with open(archives[row["archive"]], "rb") as file:
        file.seek(row["offset"])
        return file.read(row["size"])


def _read_column(column: str, folder: str, row: dict[str, Any]) -> bytes | Path:
    cell = row[column]
    if isinstance(cell, dict):
        return cell["bytes"] if cell.get("bytes") is not None else Path(folder, cell.get("path") or "")
    return cell if cell is not None else b""


Opener = Callable[[Path, "str | None", "str | None", "str | None", Any], PhotoSource]
OPENERS: dict[str, Opener] = {"folder": open_folder, "webdataset": open_webdataset, "parquet": open_parquet}
