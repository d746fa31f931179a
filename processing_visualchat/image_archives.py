"""
Images that a data set keeps in one file: as base64, `{"id": "base64", …}` as JSON or as parquet with a column
`base64`; or encoded in the column `images` (or `image`) of the parquet file of its records.

An image in such a file is named `archive.json#id`, in rows of records `records.parquet#row.number`. The file is read
once, into Arrow, which is memory-mapped, and every image is tried; then one image at a time. What is not an image, or
has a single pixel, is not in the archive.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import fsspec
from datasets import Dataset, Features, Value
from datasets.exceptions import DatasetGenerationError
from PIL import Image
from pyarrow import parquet

from .image_loading_visualchat import decode_base64, load_image


class ImageArchive:
    """
    The images of one file.

    Args:
        path (`str`): The file; in place of a JSON file that is not there its parquet sibling will do.

    Raises:
        `FileNotFoundError`: neither is there.
        `ValueError`: a file that is not of this form.
    """

    def __init__(self, path: str):
        file = find_archive(Path(path))
        if file is None:
            raise FileNotFoundError(f"No image archive at {path}, nor as parquet beside it.")
        status = file.stat()
        options = {"path": str(file.resolve()), "key": f"{status.st_size}-{status.st_mtime_ns}"}
        try:
            self.rows = Dataset.from_generator(_generate_images, features=ROWS, gen_kwargs=options)
        except DatasetGenerationError as error:
            raise (error.__cause__ or error) from None
        names = zip(self.rows["id"], self.rows["is_image"])
        self.places = {name: place for place, (name, is_image) in enumerate(names) if is_image}

    def __contains__(self, name: str) -> bool:
        return name in self.places

    def __getitem__(self, name: str) -> bytes:
        """The encoded image."""
        return self.rows[self.places[name]]["data"]


def open_archive(path: str) -> ImageArchive:
    """An archive, opened once as long as its file stays as it is."""
    file = find_archive(Path(path))
    return _open_archive(path, None if file is None else (file.stat().st_size, file.stat().st_mtime_ns))


@lru_cache(maxsize=16)
def _open_archive(path: str, stamp: tuple[int, int] | None) -> ImageArchive:
    return ImageArchive(path)


def find_archive(path: Path) -> Path | None:
    """The file itself or, if it is not there, its parquet sibling."""
    return next((file for file in (path, path.with_suffix(".parquet")) if file.is_file()), None)


def split_archived(path: str) -> tuple[str, str] | None:
    """`archive.json#id` to the archive and the id; nothing for the path of an image file."""
    match = re.fullmatch(r"(.+?\.(?:json|parquet))#(.+)", path)
    return (match[1], match[2]) if match else None


def open_training_image(source: Any) -> Image.Image:
    """
    One image to learn from, out of an archive or of whatever [`load_image`] takes.

    Raises:
        `FileNotFoundError`: it is not there.
        `ValueError`: it cannot be read, or is one pixel high or wide, as what stands for a lost image often is.
    """
    archived = split_archived(source) if isinstance(source, str) else None
    if archived is not None:
        archive, name = open_archive(archived[0]), archived[1]
        if name not in archive:
            raise ValueError(f"{archived[0]} holds no image {name}, or a broken one.")
        source = archive[name]
    elif isinstance(source, str) and source.startswith("hf://"):
        with fsspec.open(source, "rb") as file:
            source = file.read()
    image = load_image(source)
    if min(image.size) < 2:
        name = source if isinstance(source, str) else "in memory"
        raise ValueError(f"The image {name:.200} has {image.width} x {image.height} pixels; it shows nothing.")
    return image


def decode_image_text(text: str) -> bytes:
    """The encoded image in base64 text or a `data:` URI; no bytes if it is neither."""
    return decode_base64(text.rpartition(",")[2]) or b""


def digest_of(data: bytes) -> str:
    """What tells the content of an encoded image from another's."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


ROW_IMAGES = ("images", "image")  # columns in which rows of parquet files keep images
ROWS = Features({"id": Value("string"), "data": Value("large_binary"), "is_image": Value("bool")})


def _generate_images(path: str, key: str) -> Iterator[dict]:
    yield {"id": "", "data": b"", "is_image": False}  # `datasets` reads no file that has no row
    for name, data in _read_parquet(path) if path.endswith(".parquet") else _read_json(path):
        yield {"id": name.encode("utf-8", "replace").decode(), "data": data, "is_image": _is_image(data)}


def _read_json(path: str) -> Iterator[tuple[str, bytes]]:
    try:
        images = json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not whole JSON: {error}. Was it fetched to its end?") from error
    if not isinstance(images, dict):
        raise ValueError(f"{path} has another schema: at its top it should have a dict of base64 by image id.")
    yield from ((name, _decode(text)) for name, text in images.items())


def _read_parquet(path: str) -> Iterator[tuple[str, bytes]]:
    file = parquet.ParquetFile(path)
    columns = file.schema_arrow.names
    row_images = [name for name in ROW_IMAGES if name in columns]
    names = [name for name in ("id", "__index_level_0__") if name in columns]
    if names and "base64" in columns:
        for batch in file.iter_batches(batch_size=64, columns=[names[0], "base64"]):
            yield from ((str(row[names[0]]), _decode(row["base64"])) for row in batch.to_pylist())
    elif not row_images:
        raise ValueError(f"{path} has the columns {', '.join(columns)}; it should have id and base64, or images.")
    batches = file.iter_batches(batch_size=64, columns=row_images) if row_images else ()
    rows = (row for batch in batches for row in batch.to_pylist())
    for number, row in enumerate(rows):
        values: Any = next((row[name] for name in row_images if row[name]), [])
        for index, value in enumerate(values if isinstance(values, list) else [values]):
            data = value.get("bytes") if isinstance(value, dict) else value
            if isinstance(data, bytes):
                yield f"{number}.{index}", data


def _decode(text: Any) -> bytes:
    """Base64 of either alphabet to bytes; nothing if it is not that."""
    if isinstance(text, bytes):
        text = text.decode("ascii", "replace")
    return (decode_base64(text) if isinstance(text, str) else None) or b""


def _is_image(data: bytes) -> bool:
    try:
        open_training_image(data)
    except (ValueError, OSError):
        return False
    return True
