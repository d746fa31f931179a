"""
Images that a data set keeps as base64 in one file, `{"id": "base64", …}` as JSON or as parquet with a column `base64`.

An image in such a file is named `archive.json#id`. The file is read once, into Arrow, which is memory-mapped; then one
image at a time.
"""

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from datasets import Dataset


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
        self.rows = _read_parquet(file) if file.suffix == ".parquet" else _read_json(file)
        self.places = {name: place for place, name in enumerate(self.rows["id"])}

    def __contains__(self, name: str) -> bool:
        return name in self.places

    def __getitem__(self, name: str) -> str:
        """The image as base64, in the usual alphabet whichever the file has."""
        text = "".join(self.rows[self.places[name]]["base64"].split()).translate(str.maketrans("-_", "+/"))
        return text + "=" * (-len(text) % 4)


@lru_cache(maxsize=16)
def open_archive(path: str) -> ImageArchive:
    """An archive, opened once."""
    return ImageArchive(path)


def find_archive(path: Path) -> Path | None:
    """The file itself or, if it is not there, its parquet sibling."""
    return next((file for file in (path, path.with_suffix(".parquet")) if file.is_file()), None)


def split_archived(path: str) -> tuple[str, str] | None:
    """`archive.json#id` to the archive and the id; nothing for the path of an image file."""
    match = re.fullmatch(r"(.+\.(?:json|parquet))#(.+)", path)
    return (match[1], match[2]) if match else None


def resolve_archived(messages: list[dict]) -> list[dict]:
    """Messages in which images in archives have become base64."""

    def resolve(block):
        found = split_archived(str(block.get("path", ""))) if isinstance(block, dict) else None
        if found is None:
            return block
        return {"type": "image", "base64": open_archive(found[0])[found[1]]}

    return [
        {**message, "content": [resolve(block) for block in message["content"]]}
        if isinstance(message, dict) and isinstance(message.get("content"), (list, tuple))
        else message
        for message in messages
    ]


def _read_json(file: Path) -> Dataset:
    status = file.stat()
    return Dataset.from_generator(
        _generate_images,
        gen_kwargs={"path": str(file.resolve()), "key": f"{status.st_size}-{status.st_mtime_ns}"},
    )


def _generate_images(path: str, key: str) -> Iterator[dict]:
    try:
        images = json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not whole JSON: {error}. Was it fetched to its end?") from error
    if not isinstance(images, dict):
        raise ValueError(f"{path} has another schema: at its top it should have a dict of base64 by image id.")
    for name, text in images.items():
        yield {"id": name, "base64": text if isinstance(text, str) else ""}


def _read_parquet(file: Path) -> Dataset:
    rows = Dataset.from_parquet(str(file))
    names = [name for name in ("id", "__index_level_0__") if name in rows.column_names]
    if not names or "base64" not in rows.column_names:
        raise ValueError(f"{file} has the columns {', '.join(rows.column_names)}; it should have id and base64.")
    return rows.rename_column(names[0], "id") if names[0] != "id" else rows
