"""
Conversations of one's own as a source: a file, a folder or a data set on the Hub.

Files are JSON lines, JSON (a list of records) or parquet, each record of one of the shapes in `record_shapes.py`.
Image paths are relative to the file, or to a folder that is named. Images inside of a parquet file stay there: they
are named `file.parquet#row.number`. Of a folder with several splits the one asked for is read, told by the names of
the files in the words that `datasets` knows.
"""

import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from glob import has_magic
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from datasets import Dataset
from datasets.data_files import SPLIT_KEYWORDS
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from pyarrow import ArrowException, parquet

from .image_archives import ROW_IMAGES, decode_image_text, open_training_image
from .readings import (
    Reading,
    SourceReport,
    check_reading,
    images_are_there,
    keep_readings,
    list_below,
    parse_json,
    reading_key,
    rows_of_readings,
)
from .record_shapes import Messages, convert_record
from .source_converters import Dropped


SUFFIXES = (".jsonl", ".json", ".parquet")
DESCRIPTIONS = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")  # of `datasets`
COLUMNS = ("messages", "conversations", *ROW_IMAGES)


@dataclass(frozen=True)
class OwnSource:
    """
    Where conversations of one's own are.

    Args:
        name (`str`): What to call the source.
        path (`str`, *optional*): A file, a folder, or a pattern like `train-*.parquet`, under the data root or, with
            `hub`, in the repository.
        hub (`str`, *optional*): A data set on the Hub, `user/name`; it is fetched once, as a whole.
        revision (`str`, *optional*): Its branch, tag or commit.
        split (`str`, *optional*, defaults to `"train"`): Which split of a folder.
        images (`str`, *optional*): The folder that image paths are relative to, under the data root or, with `hub`, in
            the repository; by default each file's own.
    """

    name: str
    path: str | None = None
    hub: str | None = None
    revision: str | None = None
    split: str = "train"
    images: str | None = None


def load_own_source(
    source: OwnSource, data_root: str | Path, check_files: bool = True
) -> tuple[Dataset, SourceReport]:
    """
    Reads conversations of one's own, as [`load_source`] reads published ones.

    Args:
        source ([`OwnSource`]): Where they are.
        data_root (`str` or `Path`): The folder that paths are relative to.
        check_files (`bool`, *optional*, defaults to `True`): Drops conversations of which an image is not there.

    Returns:
        The conversations and the [`SourceReport`], see [`load_source`].

    Raises:
        `ValueError`: a data set that cannot be fetched, a file that is not whole or of another kind, or a source of
            which nothing is left.
        `FileNotFoundError`: there is no file.
    """
    root = Path(os.path.abspath(data_root))
    base = root if source.hub is None else _fetch(source)
    files = find_files(source, base)
    images = find_images(source, base)
    folders = {images or file.parent for file in files}
    options = {
        "files": [str(file) for file in files],
        "root": str(root),
        "images": None if images is None else str(images),
        "check_files": check_files,
        "key": reading_key([*files, *list_below(folders)], "own_sources.py"),
    }
    return keep_readings(source.name, _generate_rows, options)


def find_files(source: OwnSource, base: Path) -> list[Path]:
    """
    The files of a source.

    Raises:
        `FileNotFoundError`: there is none.
        `ValueError`: a file of another kind, one that lies outside of `base`, or a split of what is no folder.
    """
    path = _under(base, source.path or "", source.name)
    if not path.is_dir() and source.split != "train":
        raise ValueError(f"The source {source.name} asks for the split {source.split}, which only a folder has.")
    if path.is_file():
        files = [path]
    elif path.is_dir():
        splits = find_splits(path)
        if source.split not in splits:
            found = f"it has the splits {', '.join(sorted(splits))}" if splits else "it has no data files"
            raise FileNotFoundError(f"The source {source.name} has no split {source.split} in {path}; {found}.")
        files = splits[source.split]
    else:
        files = sorted(found for found in base.glob(str(path.relative_to(base))) if found.is_file())
    if not files:
        raise FileNotFoundError(f"The source {source.name} has no file at {path}.")
    for file in files:
        if file.suffix not in SUFFIXES:
            raise ValueError(f"The source {source.name} has the file {file}; it can be one of {', '.join(SUFFIXES)}.")
    return files


def find_images(source: OwnSource, base: Path) -> Path | None:
    """The folder that image paths are relative to, if the source names one; an error if it is not there."""
    images = None if source.images is None else _under(base, source.images, source.name)
    if images is not None and not images.is_dir():
        raise FileNotFoundError(f"The source {source.name} has its images in {images}; there is no such folder.")
    return images


def _under(base: Path, name: str, source: str) -> Path:
    path = Path(os.path.normpath(base / name))
    if not path.is_relative_to(base) or (".." in PurePosixPath(name).parts and has_magic(name)):
        raise ValueError(f"The source {source} has the path {name}, which leads out of {base}.")
    return path


def find_splits(folder: Path) -> dict[str, list[Path]]:
    """The data files of a folder by split, see [`split_files`]."""
    names = (str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    return {split: [folder / name for name in files] for split, files in split_files(names).items()}


def split_files(names: Iterable[str]) -> dict[str, list[str]]:
    """The data files among the files of a folder, by split; those whose name says nothing are for training."""
    splits: dict[str, list[str]] = {}
    for name in sorted(names):
        path = PurePosixPath(name)
        is_hidden = any(part.startswith(".") for part in path.parts)
        if path.suffix in SUFFIXES and not is_hidden and path.name not in DESCRIPTIONS:
            words = set(re.split(r"[^a-z]+", name.lower()))
            found = (str(split) for split, keywords in SPLIT_KEYWORDS.items() if words & set(keywords))
            splits.setdefault(next(found, "train"), []).append(name)
    return splits


def _fetch(source: OwnSource) -> Path:
    try:
        return Path(snapshot_download(source.hub, repo_type="dataset", revision=source.revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"The source {source.name} cannot be fetched from the Hub, data set {source.hub}. Is the name right, "
            f"and are you logged in if it is private or gated? {error}"
        ) from error


def _generate_rows(files: list[str], root: str, images: str | None, check_files: bool, key: str) -> Iterator[dict]:
    are_there = partial(images_are_there, root=Path(root)) if check_files else lambda images: True
    readings = (
        check_reading(reading, are_there)
        for file in files
        for reading in read_file(Path(file), Path(root), None if images is None else Path(images))
    )
    yield from rows_of_readings(readings, root)


def read_file(file: Path, root: Path, images: Path | None = None) -> Iterator[Reading]:
    """What became of every record of a file; image names are relative to the root."""
    name = _name_under(root, file)
    with file.open("rb") as contents:
        for where, record in RECORDS[file.suffix](contents, str(file), partial(_name_in_file, file)):
            outcome = record if isinstance(record, Dropped) else convert_record(record)
            if isinstance(outcome, Messages):
                outcome = _place_images(outcome, images or file.parent, root, f"{file}#")
            yield Reading(f"{name}, {where}", 1, outcome)


Refer = Callable[[bytes, int, int], str]


def _name_in_file(file: Path, data: bytes, row: int, number: int) -> str:
    return f"{file}#{row}.{number}"


def _read_lines(contents: BinaryIO, name: str, refer: Refer) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(contents, start=1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line)
        except (ValueError, RecursionError):
            yield f"line {number}", Dropped("a line that is not JSON")


def _read_list(contents: BinaryIO, name: str, refer: Refer) -> Iterator[tuple[str, Any]]:
    data = contents.read()
    first, _, rest = data.strip().partition(b"\n")
    if first.startswith(b"{") and first.endswith(b"}") and rest:  # JSON lines under another name
        yield from _read_lines(io.BytesIO(data), name, refer)
        return
    records = parse_json(data, name)
    if not isinstance(records, list):
        raise ValueError(f"{name} is not a list of records at its top, but a {type(records).__name__}.")
    yield from ((f"record {index}", record) for index, record in enumerate(records))


def _read_parquet(contents: BinaryIO, name: str, refer: Refer) -> Iterator[tuple[str, Any]]:
    """Rows, in which encoded images have become what `refer` makes of them, their row and their number in it."""

    def refer_to(value: Any, row: int, number: int) -> Any:
        data = value.get("bytes") if isinstance(value, dict) else value
        if isinstance(data, bytes) and data:
            return refer(data, row, number)
        return value.get("path") if isinstance(value, dict) else value

    def read_rows() -> Iterator[dict]:
        try:
            file = parquet.ParquetFile(contents)
            columns = [column for column in COLUMNS if column in file.schema_arrow.names]
            for batch in file.iter_batches(batch_size=64, columns=columns):
                yield from batch.to_pylist()
        except (ArrowException, OSError, ValueError, OverflowError) as error:
            raise ValueError(f"{name} is not whole parquet: {error} Was it fetched to its end?") from error

    for row, record in enumerate(read_rows()):
        for column in ROW_IMAGES:
            values = record.get(column)
            if values is not None:
                values = values if isinstance(values, list) else [values]
                record[column] = [refer_to(value, row, number) for number, value in enumerate(values)]
        yield f"row {row}", record


RECORDS: dict[str, Callable[[BinaryIO, str, Refer], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _read_lines,
    ".json": _read_list,
    ".parquet": _read_parquet,
}


def _place_images(outcome: Messages, folder: Path, root: Path, archive: str) -> Messages | Dropped:
    """Image paths from relative to a folder to relative to the root; images inside of the record are tried out."""
    outcome = replace(outcome, turns=outcome.messages())
    for block in outcome.blocks:
        if "path" in block:
            if re.fullmatch(re.escape(archive) + r"\d+\.\d+", block["path"]):  # out of its own row
                block["path"] = _name_under(root, Path(block["path"]))
                continue
            path = Path(os.path.normpath(folder / block["path"]))
            if not path.is_relative_to(folder):
                return Dropped("image path outside of its folder")
            block["path"] = _name_under(root, path)
        elif "base64" in block:
            try:
                open_training_image(decode_image_text(block["base64"]))
            except (ValueError, OSError):
                return Dropped("an image that is broken, or one pixel wide or high")
    return outcome


def _name_under(root: Path, path: Path) -> str:
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)
