"""Files of records and images: JSON and tables with errors that name the file, their state, and cached rows."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
from datasets import Dataset, Features, config
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher
from filelock import FileLock
from fsspec.core import OpenFile, get_compression, url_to_fs
from fsspec.implementations.local import LocalFileSystem
from pyarrow import ipc, parquet


DATA_VERSION = 3  # part of every cache key: raise it when the same files yield different rows
ARCHIVE_SUFFIXES = (".json", ".parquet", ".arrow")
TABLE_BATCH = 64  # rows


class Repeating(dict):
    """A JSON object with keys that it has more than once; the last value counts."""

    repeated: tuple[str, ...] = ()


def _read_object(pairs: list[tuple[str, Any]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        found = Repeating(found)
        last = {key: index for index, (key, _) in enumerate(pairs)}
        found.repeated = tuple(key for index, (key, _) in enumerate(pairs) if last[key] != index)
    return found


def parse_json(data: bytes, name: str) -> Any:
    """JSON; a `ValueError` says where it breaks. An object with a repeated key is [`Repeating`]."""
    try:
        return json.loads(data, object_pairs_hook=_read_object)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"{name} is not whole JSON: {error.msg} at {place}. Was the download complete?") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} {describe_json_error(error)}.") from error


def describe_json_error(error: Exception) -> str:
    """The fault of a JSON text, as the predicate of a sentence."""
    if isinstance(error, UnicodeDecodeError):
        return f"is not UTF-8 text: {error.reason} at byte {error.start}"
    if isinstance(error, json.JSONDecodeError):
        return f"is not JSON: {error.msg} at column {error.colno}"
    return f"cannot be read as JSON: {error}"


def open_file(file: str) -> OpenFile:
    """A local file, or one at a URL, to be opened; decompressed if its name says so."""
    filesystem, path = url_to_fs(file) if "://" in file else (LocalFileSystem(), file)
    return OpenFile(filesystem, path, compression=get_compression(file, "infer"))


def suffix_of(name: str) -> str:
    """The suffix of a file without that of a compression, `.jsonl` of `a.jsonl.gz`."""
    base, suffix = os.path.splitext(name)
    return os.path.splitext(base)[1] if get_compression(name, "infer") else suffix


def read_table(contents: BinaryIO, name: str, is_read: Callable[[pyarrow.Field], bool]) -> Iterator[dict]:
    """The rows of a parquet file, or of an Arrow file as `datasets` saves it; a `ValueError` if it is broken."""
    suffix = suffix_of(name)
    try:
        table = ipc.open_stream(contents) if suffix == ".arrow" else parquet.ParquetFile(contents)
        columns = [field.name for field in getattr(table, "schema_arrow", table.schema) if is_read(field)]
        for batch in table if suffix == ".arrow" else table.iter_batches(TABLE_BATCH, columns=columns):
            for start in range(0, len(batch), TABLE_BATCH):
                yield from batch.select(columns).slice(start, TABLE_BATCH).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} is not whole {suffix[1:]}: {error} Was the download complete?") from error


def digest_of(data: bytes) -> str:
    """128 bits of BLAKE2b, in hexadecimal."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def digest_file(path: str | Path) -> str:
    """The digest of the content of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def stamp_of(path: str | Path) -> tuple[int, int] | None:
    """Size and modification time of a file or folder."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns


def cache_rows(
    generate: Callable[..., Iterator[dict]],
    features: Features,
    options: dict[str, Any],
    files: Iterable[Path] = (),
    num_proc: int = 1,
    is_current: Callable[[Dataset], bool] = lambda rows: True,
) -> Dataset:
    """
    The rows, at least one, that `generate(**options)` yields; cached until one of the files changes or they are no
    longer current, and then replaced. It is a function of a module, since its name is part of the cache key.
    """
    state = [(str(path), stamp_of(path)) for path in files]
    name = Hasher.hash([generate.__module__, generate.__qualname__, options, DATA_VERSION])
    folder = Path(config.HF_DATASETS_CACHE, "visualchat", name)
    current = folder / digest_of(str(state).encode())
    folder.mkdir(parents=True, exist_ok=True)

    def read() -> Dataset:
        try:
            return Dataset.from_generator(
                generate, features=features, gen_kwargs=options, num_proc=num_proc, cache_dir=str(current)
            )
        except DatasetGenerationError as error:
            raise (error.__cause__ or error) from None

    with FileLock(f"{folder}.lock"):
        was_there, rows = current.is_dir(), read()
        if was_there and not is_current(rows):
            shutil.rmtree(current)
            rows = read()
        for outdated in set(folder.iterdir()) - {current}:
            shutil.rmtree(outdated, ignore_errors=True)
    return rows
