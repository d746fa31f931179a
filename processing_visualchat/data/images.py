"""
Image references: where an encoded image is, as a value that opens itself.

    kind       text                               the image
    file       a.png                              a local file
    archive    a.json#id, a.parquet#row.number    one of many in a file, see [`open_archive`]; also in .arrow
    url        https://…                          downloaded when it is opened
    hub        hf://datasets/…                    a file of a repository on the Hub
    inline     data:… or base64                   inside its record; named `inline:` and its digest

The text is what records contain and what is stored in columns; only this file parses it.
"""

import base64
import contextlib
import os
import posixpath
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
from datasets import Dataset, Features, Value
from PIL import Image, UnidentifiedImageError

from ..conversation_visualchat import image_source
from ..image_loading_visualchat import decode_base64, load_image
from .files import cache_rows, digest_of, open_file, parse_json, read_table, stamp_of


LONGEST_NAME = 255  # characters; longer text in the base64 alphabet is an image, not a path
MISSING_IMAGE = "an image is not there"
BROKEN_BASE64 = "an image of broken base64 text"
READING_FAULTS = {
    IsADirectoryError: "a folder in place of an image",
    PermissionError: "an image file that may not be read",
}
BOMB = "an image with too many pixels to be opened safely; scale it down"
DECODING_FAULTS = {  # by the cause of the error
    Image.DecompressionBombWarning: BOMB,
    Image.DecompressionBombError: BOMB,
    UnidentifiedImageError: "a file in place of an image that Pillow cannot read",
    type(None): "an image one pixel wide or high",
}
SIGNATURES = {  # of data that cannot be decoded, by its beginning
    rb"\Z": "an empty image file",
    rb"(?s).{4}ftyp(hei|hev|mif1|msf1)": "an image in HEIC; convert it to JPEG or PNG",
    rb"(?s)\s*(<[?!].{0,2000}>\s*)?<svg": "an image in SVG; convert it to PNG",
    rb"(?i)\s*<(!doctype html|html|head|body)": "an HTML page in place of an image",
    rb"version https://git-lfs": "a Git LFS pointer in place of an image; run git lfs pull",
}


class ImageContent(NamedTuple):
    """The digest of the pixels of an image, or of its bytes if they are not decoded; and why it cannot be used."""

    digest: str
    fault: str = ""


@dataclass(frozen=True)
class ImageReference:
    """
    Where an image is.

    Args:
        kind (`str`): `"file"`, `"archive"`, `"url"`, `"hub"` or `"inline"`, see above.
        path (`str`, *optional*): The path or URL of the file.
        key (`str`, *optional*): The id in an archive; for an inline image the digest of its bytes.
        data (`str`, *optional*): The base64 text of an inline image, not compared.
    """

    kind: str
    path: str = ""
    key: str = ""
    data: str = field(default="", repr=False, compare=False)

    @classmethod
    def parse(cls, text: str) -> "ImageReference":
        """The reference that a text stands for; `str` is the inverse."""
        if text.startswith(("http://", "https://")):
            return cls("url", text)
        is_long = len(text) > LONGEST_NAME
        if text.startswith("data:") or (is_long and re.fullmatch(r"[A-Za-z0-9+/_\-\s]+=*\s*", text)):
            return cls.from_base64(text)
        if match := re.fullmatch(r"inline:([0-9a-f]{32})", text):
            return cls("inline", key=match[1])
        text = text.removeprefix("file://")
        if match := re.fullmatch(r"(?s)(.+?\.(?:json|parquet|arrow))#(.+)", text):
            return cls("archive", match[1], match[2])
        return cls("hub" if text.startswith("hf://") else "file", text)

    @classmethod
    def from_base64(cls, text: str) -> "ImageReference":
        """An inline image from base64 text or a `data:` URI."""
        return cls("inline", key=digest_of(_decode_inline(text) or b""), data=text)

    @classmethod
    def from_bytes(cls, data: bytes) -> "ImageReference":
        """An inline image from its encoded bytes."""
        return cls.from_base64(f"data:image;base64,{base64.b64encode(data).decode()}")

    @classmethod
    def from_source(cls, source: Any) -> "ImageReference | None":
        """What a record gives as an image: a reference, text, bytes, or a dict with one; `None` for anything else."""
        if isinstance(source, ImageReference):
            return source
        if isinstance(source, dict):
            encoded = source.get("bytes")
            source = encoded or next((source[name] for name in ("path", "url") if source.get(name)), None)
            if isinstance(encoded, str) and encoded:
                return cls.from_base64(encoded)
        if isinstance(source, bytes) and source:
            return cls.from_bytes(source)
        return cls.parse(source) if isinstance(source, str) and source else None

    @classmethod
    def from_block(cls, block: dict) -> "ImageReference | None":
        """The image of a message's block; `None` if it has none, or an open image."""
        encoded = block.get("base64") or block.get("bytes")
        return cls.from_source(image_source(block) if encoded is None else {"bytes": encoded})

    def __str__(self) -> str:
        if self.kind == "inline":
            return f"inline:{self.key}"
        return f"{self.path}#{self.key}" if self.key else self.path

    def block(self) -> dict:
        """The image as a block of a message."""
        if self.kind == "inline":
            return {"type": "image", "base64": self.data}
        return {"type": "image", "url" if self.kind == "url" else "path": str(self)}

    @property
    def is_local(self) -> bool:
        """Whether it is in a file on this machine."""
        return self.kind in ("file", "archive")

    def under(self, root: str | Path) -> "ImageReference":
        """The same image with an absolute path; a relative one is relative to `root`."""
        return replace(self, path=os.path.join(root, self.path)) if self.is_local else self

    def relative_to(self, root: str | Path) -> "ImageReference":
        """The same image with its path relative to `root`, or unchanged if it is elsewhere."""
        return replace(self, path=self.path.removeprefix(os.path.join(root, ""))) if self.is_local else self

    def resolve(self, folder: str, record_file: str = "", links: str = "") -> "ImageReference | None":
        """
        Resolves a path that a record contains against a folder, which may be `hf://…`; nothing else does that. If it
        leads out of the folder, it is resolved against that of `record_file`, the file of the record, which it may
        also be itself. `None` if it still leads out, also by a link, unless into another folder, `links`.
        """
        if not self.is_local or (record_file and self.path == record_file):
            return self
        scheme, separator, base = folder.rpartition("://")
        module = posixpath if scheme else os.path
        root = module.normpath(base)
        starts = (root, posixpath.dirname(record_file.rpartition("://")[2]) or root)
        paths = (module.normpath(module.join(start, self.path)) for start in starts)
        path = next((path for path in paths if _is_below(path, root)), None)
        if path is None or (not scheme and module.isabs(root) and not _is_linked_below(path, links or root)):
            return None
        return replace(self, kind="hub" if scheme and not self.key else self.kind, path=f"{scheme}{separator}{path}")

    def exists(self) -> bool:
        """Whether nothing is known against it, see [`find_fault`]."""
        return not self.find_fault()

    def find_fault(self) -> str:
        """Why it cannot be used: not there, or broken in its archive; other faults are found by opening it."""
        with contextlib.suppress(OSError, ValueError):  # a path that no file can have, or a broken archive
            if self.kind == "archive":
                _, numbers, faults = open_archive(self.path)
                return faults.get(self.key, "" if self.key in numbers else MISSING_IMAGE)
            folder, name = os.path.split(self.path)
            if self.kind != "file" or name in _list_folder(folder, stamp_of(folder)):
                return ""
        is_text = len(self.path) > LONGEST_NAME and "." not in os.path.basename(self.path)
        return BROKEN_BASE64 if is_text else MISSING_IMAGE

    def examine(self, decode: bool = True) -> ImageContent:
        """Reads the image; a digest of the reference stands for one that cannot be read, or is not downloaded."""
        unread = ImageContent(self.digest_name())
        if self.kind == "url":
            return unread
        try:
            data = _decode_inline(self.data) if self.kind == "inline" else self.read()
        except tuple(READING_FAULTS) as error:
            return unread._replace(fault=READING_FAULTS[type(error)])
        except (OSError, ValueError):
            return unread._replace(fault=self.find_fault() or MISSING_IMAGE)
        image, fault = decode_image(data) if decode else (None, "")
        return ImageContent(digest_of(data or b"") if image is None else digest_pixels(image), fault)

    def read(self) -> bytes:
        """The encoded image, of any kind but a URL; an `OSError` or `ValueError` if it cannot be read."""
        if self.kind == "archive":
            rows, numbers, _ = open_archive(self.path)
            if fault := self.find_fault():
                raise ValueError(f"{self.path} holds no image {self.key} of use: {fault}.")
            return rows[numbers[self.key]]["data"]
        if self.kind == "inline":
            if data := _decode_inline(self.data):
                return data
            raise ValueError(f"The image inside its record is not base64 text: {self.data!r:.60}.")
        with open_file(self.path) if self.kind == "hub" else open(self.path, "rb") as file:
            return file.read()

    def open(self) -> Image.Image:
        """The decoded image in RGB, see [`open_image`] for the errors."""
        return open_image(self.path if self.kind in ("file", "url") else self.read(), str(self))

    def digest(self) -> str:
        """The digest of its pixels, see [`examine`]."""
        return self.examine().digest

    def digest_name(self) -> str:
        """The digest of the reference."""
        return digest_of(str(self).encode("utf-8", "replace"))


def _is_below(path: str, folder: str) -> bool:
    return path.startswith(os.path.join(folder, ""))


def _is_linked_below(path: str, folder: str) -> bool:
    """Whether a path is in a folder after all links are followed; a path that no file can have is nowhere else."""
    try:
        return _is_below(os.path.realpath(path), os.path.realpath(folder))
    except (OSError, ValueError):
        return True


def replace_encoded(value: Any, change: Callable[[bytes], Any]) -> Any:
    """A row of a table in which encoded images, at any depth, are replaced in their order."""
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        return change(value["bytes"])
    if isinstance(value, dict):
        return {key: replace_encoded(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [replace_encoded(item, change) for item in value]
    return change(value) if isinstance(value, bytes) else value


def open_image(source: Any, name: str = "in memory") -> Image.Image:
    """Opens an image as [`load_image`] does; one pixel in height or width, as of a lost image, is a `ValueError`."""
    image = load_image(source)
    if min(image.size) < 2:
        raise ValueError(f"The image {name:.200} has {image.width} x {image.height} pixels; it shows nothing.")
    return image


def decode_image(data: bytes | None) -> tuple[Image.Image | None, str]:
    """The image or, if it cannot be used for training, the reason; `None` stands for broken base64."""
    if data is None:
        return None, BROKEN_BASE64
    try:
        return open_image(data), ""
    except (ValueError, OSError) as error:
        found = next((reason for pattern, reason in SIGNATURES.items() if re.match(pattern, data)), None)
        return None, found or DECODING_FAULTS.get(type(error.__cause__), "an image that is truncated or broken")


def digest_pixels(image: Image.Image) -> str:
    """The digest of the size and the pixels of an image in RGB."""
    return digest_of(f"{image.size}".encode() + image.tobytes())


@lru_cache(maxsize=64)
def _list_folder(folder: str, stamp: object) -> frozenset[str]:
    return frozenset(os.listdir(folder)) if os.path.isdir(folder) else frozenset()


def _decode_inline(text: str) -> bytes | None:
    return decode_base64(text.rpartition(",")[2]) or None


def open_archive(path: str) -> tuple[Dataset, dict[str, int], dict[str, str]]:
    """
    The images of a file, or of its parquet sibling, and their row numbers by name; and the faults of those that cannot
    be used. It is opened once while it is unchanged.

    It has base64 by id: as JSON (`{"id": "base64", …}`), or as parquet with the columns `id` and `base64`. Or it is a
    table of records, whose encoded images are named `row.number`.
    """
    file = find_archive(Path(path))
    if file is None:
        raise FileNotFoundError(f"No image archive at {path}, nor as parquet beside it.")
    return _read_archive(file.resolve(), stamp_of(file))


@lru_cache(maxsize=16)
def _read_archive(file: Path, stamp: object) -> tuple[Dataset, dict[str, int], dict[str, str]]:
    rows = cache_rows(_generate_images, ARCHIVE_FEATURES, {"path": str(file)}, [file])
    names, faults = rows["id"][:], rows["fault"][:]
    numbers = {name: index for index, name in enumerate(names) if index}
    return rows, numbers, {name: fault for name, fault in zip(names, faults) if fault}


def find_archive(path: Path) -> Path | None:
    """The file itself or, if it does not exist, its parquet sibling."""
    return next((file for file in (path, path.with_suffix(".parquet")) if file.is_file()), None)


ARCHIVE_FEATURES = Features({"id": Value("string"), "data": Value("large_binary"), "fault": Value("string")})
IDS = ("id", "__index_level_0__", "base64")  # columns of images by id


def _generate_images(path: str) -> Iterator[dict]:
    yield {"id": "", "data": b"", "fault": ""}  # `datasets` cannot build an empty dataset
    for name, data in _read_json(path) if path.endswith(".json") else _read_table(path):
        yield {"id": name.encode("utf-8", "replace").decode(), "data": data or b"", "fault": decode_image(data)[1]}


def _read_json(path: str) -> Iterator[tuple[str, bytes | None]]:
    images = parse_json(Path(path).read_bytes(), path)
    if not isinstance(images, dict):
        raise ValueError(f"{path} has another schema: at its top it should have a dict of base64 by image id.")
    yield from ((name, decode_base64(text)) for name, text in images.items())


def _read_table(path: str) -> Iterator[tuple[str, bytes | None]]:
    with open_file(path) as contents:
        for number, row in enumerate(read_table(contents, path, lambda field: field.name in IDS or may_hold(field))):
            name = next((row.pop(name) for name in IDS[:2] if row.get(name) is not None), None)
            if name is not None and (encoded := row.pop("base64", None)):
                yield str(name), decode_base64(encoded)
            images: list[bytes] = []
            replace_encoded(row, images.append)
            yield from ((f"{number}.{index}", data) for index, data in enumerate(images))


def may_hold(field: pyarrow.Field) -> bool:
    """Whether a column may hold encoded images, at any depth."""
    return "binary" in str(field.type)
