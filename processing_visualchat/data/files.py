"""Files of records and images: JSON and parquet with errors that name the file, their state, and cached rows."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from datasets import Dataset, Features, config
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher
from filelock import FileLock
from pyarrow import ArrowException, parquet


DATA_VERSION = 2  # part of every cache key: raise it when the same files yield different rows
ARCHIVE_SUFFIXES = (".json", ".parquet")


def parse_json(data: bytes, name: str) -> Any:
    """JSON; a `ValueError` says where it breaks."""
    try:
        return json.loads(data)
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


def read_parquet(contents: str | BinaryIO, name: str, columns: Collection[str]) -> Iterator[dict]:
    """The rows of a parquet file, with those of the columns that it has; a `ValueError` if it is broken."""
    try:
        file = parquet.ParquetFile(contents)
        present = [column for column in columns if column in file.schema_arrow.names]
        for batch in file.iter_batches(batch_size=64, columns=present):
            yield from batch.to_pylist()
    except (ArrowException, OSError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} is not whole parquet: {error} Was the download complete?") from error


def digest_of(data: bytes) -> str:
    """128 bits of BLAKE2b, in hexadecimal."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


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
