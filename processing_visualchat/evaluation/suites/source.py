"""What the loaders of all suites share: files, local or of the Hub, their records, images and errors."""

import io
import itertools
import re
import string
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from PIL import Image

from ...data.conversation import Dropped
from ...data.files import open_file, parse_json, suffix_of
from ...data.images import ImageReference
from ...data.readers import RECORDS
from ..records import Example, SuiteError


LETTERS = string.ascii_uppercase
IMAGE_TAG = "<image>"
WITH_LETTER = "Answer with the option's letter from the given choices directly."
WITH_PHRASE = "Answer the question using a single word or phrase."


@dataclass(frozen=True)
class RawRecord:
    """A record of a suite's file, whose fields are checked when they are read."""

    where: str  # file and record
    fields: dict[str, Any]
    file: Path
    number: int = 0  # position in its file
    links: str = ""  # the folder that links in the suite's folder may lead to

    def fault(self, found: str, expected: str) -> SuiteError:
        """The error that this record `found`, with what was `expected` instead."""
        return SuiteError(f"{self.where} {found}; expected {expected}.")

    def get(self, key: str, *types: type) -> Any:
        """A field of one of the types; a text or list is not empty."""
        value = self.fields.get(key)
        is_empty = isinstance(value, (str, list, dict)) and not (value.strip() if isinstance(value, str) else value)
        if not isinstance(value, types) or isinstance(value, bool) or is_empty:
            found = f"{key} {value!r:.60}" if key in self.fields else f"no {key} but {', '.join(self.fields)}"
            raise self.fault(f"has {found}", f"{key} as {' or '.join(each.__name__ for each in types)}")
        return value

    def text(self, key: str) -> str:
        return self.get(key, str)

    def texts(self, key: str) -> list[str]:
        """A list of texts."""
        values = self.get(key, list)
        if not all(isinstance(value, str) for value in values):
            raise self.fault(f"has {key} {values!r:.60}", "texts")
        return values

    def options(self, key: str) -> list[str]:
        """The texts of options, with a letter for each."""
        options = self.texts(key)
        if len(options) > len(LETTERS):
            raise self.fault(f"has {len(options)} {key}", f"at most {len(LETTERS)}")
        return options

    def record(self, key: str) -> "RawRecord":
        """A record inside of this one."""
        return RawRecord(f"{self.where}, {key}", self.get(key, dict), self.file)

    def image(self, source: Any, folder: Path) -> ImageReference:
        """An image that the record gives as a path below the folder, or embedded; it exists and is one."""
        image = ImageReference.from_source(source)
        if image is None:
            raise self.fault(f"has an image {source!r:.60}", "a path or an encoded image")
        found = image.resolve(str(folder), links=self.links)
        if found is None:
            raise self.fault(f"names the image {image}", f"a path below {folder}")
        if fault := find_fault(found):
            raise self.fault(f"shows {found}: {fault}", f"an image{hint_archives(folder)}")
        return found

    def letter(self, answer: Any, num_choices: int) -> str:
        """The letter of an answer like `B`, `(B)` or `B.`, which is one of the options."""
        match = re.fullmatch(r"\(?([A-Z])[).:]?", str(answer).strip())
        if match is None or LETTERS.index(match[1]) >= num_choices:
            raise self.fault(f"has the answer {answer!r:.60}", f"a letter from A to {LETTERS[num_choices - 1]}")
        return match[1]


def find_fault(image: ImageReference) -> str:
    """Why an image cannot be opened, as told by its header; a URL is not opened."""
    if image.kind == "url":
        return ""
    try:
        with Image.open(image.path if image.kind == "file" else io.BytesIO(image.read())):
            return ""
    except (OSError, ValueError, Image.DecompressionBombError):
        return image.examine().fault


def hint_archives(folder: Path) -> str:
    """A reminder to unpack the archives in a folder or the one above, for an error."""
    files = [*folder.glob("*"), *folder.parent.glob("*")]
    names = sorted(file.name for file in files if re.search(r"\.(zip|tar|tar\.gz|tgz)$", file.name))
    return f", are {', '.join(names)} unpacked" if names else ""


def read_records(file: Path, columns: Iterable[str] = ()) -> Iterator[RawRecord]:
    """The records of a list in JSON, of JSON lines or of a table, of which `columns` and images are read."""
    if suffix_of(file.name) not in RECORDS:
        raise SuiteError(f"{file} cannot be read; expected one of {', '.join(RECORDS)}.")
    try:
        with open_file(str(file)) as contents:
            records = RECORDS[suffix_of(file.name)](contents, str(file), frozenset(columns))
            for number, (place, record) in enumerate(records):
                if isinstance(record, Dropped):
                    raise SuiteError(f"{file}, {place} {record.detail}; expected JSON.")
                yield to_record(f"{file}, {place}", record, file, number)
    except (EOFError, OSError, zlib.error) as error:
        raise SuiteError(f"{file} is not a whole file: {error}. Was the download complete?") from error
    except SuiteError:
        raise
    except ValueError as error:
        raise SuiteError(str(error)) from error


def read_object(file: Path) -> dict[str, Any]:
    """A file of JSON with an object at its top, no key of which is repeated."""
    try:
        contents = parse_json(file.read_bytes(), str(file))
    except ValueError as error:
        raise SuiteError(str(error)) from error
    if not isinstance(contents, dict) or not contents:
        raise SuiteError(f"{file} has a {type(contents).__name__} at its top; expected an object that is not empty.")
    if repeated := getattr(contents, "repeated", ()):
        raise SuiteError(f"{file} has the key {repeated[0]!r} more than once; expected one record for each.")
    return contents


def to_record(where: str, record: Any, file: Path, number: int = 0) -> RawRecord:
    """A record with its place, which is an object."""
    if not isinstance(record, dict):
        raise SuiteError(f"{where} is a {type(record).__name__}; expected an object.")
    return RawRecord(where, record, file, number)


def locate(source: str | Path, name: str) -> tuple[Path, str]:
    """
    The local file or folder; what is not there, and reads as `user/name`, is downloaded from the Hub. And the folder
    that links in it may lead to.
    """
    path = Path(source)
    if path.exists():
        return path.absolute(), ""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)):
        raise SuiteError(f"The suite {name} is not at {source}; expected its folder or file, or a dataset on the Hub.")
    try:
        path = Path(snapshot_download(str(source), repo_type="dataset"))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise SuiteError(
            f"The suite {name} is neither at {source} nor can it be downloaded from the Hub, dataset {source}. Is the "
            f"name right, and are you logged in if it is private or gated? {error}"
        ) from error
    return path, str(path.parent.parent)


def find_files(path: Path, patterns: Sequence[str], name: str, is_read: Callable[[Path], bool]) -> list[Path]:
    """A file itself; of a folder, the files at any depth of the first pattern that has one that `is_read`."""
    if path.is_file():
        return [path]
    for pattern in patterns:
        if files := sorted(file for file in path.rglob(pattern) if file.is_file() and is_read(file)):
            return files
    raise SuiteError(f"The suite {name} has no file in {path}; expected {' or '.join(patterns)}{hint_archives(path)}.")


def suite_loader(
    name: str,
    patterns: Sequence[str],
    convert: Callable[[RawRecord, Path], Example],
    read: Callable[[Path], Iterator[RawRecord]],
    is_read: Callable[[Path], bool] = lambda file: True,
) -> Callable[[str | Path], Iterator[Example]]:
    """
    The `load` of a suite: from its files, see [`find_files`], by `read` to records, and from each of them and the
    folder of the suite by `convert` to an example, whose key no other one has.
    """

    def load(source: str | Path) -> Iterator[Example]:
        path, links = locate(source, name)
        keys: dict[str, str] = {}
        for file in find_files(path, patterns, name, is_read):
            for record in read(file):
                example = convert(replace(record, links=links), path if path.is_dir() else path.parent)
                if example.key in keys:
                    raise record.fault(f"has the key {example.key} of {keys[example.key]}", "one of its own")
                keys[example.key] = record.where
                yield example
        if not keys:
            raise SuiteError(f"The suite {name} has no record in {path}; expected at least one.")

    return load


def interleave(
    record: RawRecord,
    text: str,
    images: Sequence[ImageReference],
    tag: str = IMAGE_TAG,
    is_free: bool = False,
) -> tuple[dict[str, Any], ...]:
    """
    The content of a question, with one image in the place of each tag. `is_free` puts the images of a text without any
    tag before it.
    """
    pieces = text.split(tag)
    if is_free and len(pieces) == 1:
        pieces = [*[""] * len(images), text]
    if len(pieces) - 1 != len(images):
        raise record.fault(f"has {len(pieces) - 1} placeholders {tag} and {len(images)} images", "as many")
    blocks: list[dict[str, Any]] = []
    for piece, image in itertools.zip_longest(pieces, images):
        blocks += [{"type": "text", "text": piece}] if piece.strip() else []
        blocks += [image.block()] if image else []
    if words := [block for block in blocks if block["type"] == "text"]:
        words[0]["text"] = words[0]["text"].lstrip()
        words[-1]["text"] = words[-1]["text"].rstrip()
    return tuple(blocks)


def name_images(options: Iterable[str], shown: int, tag: str = IMAGE_TAG) -> tuple[str, ...]:
    """Options with the images in them named by their numbers, as the chat template does, after those `shown`."""
    numbers = itertools.count(shown + 1)
    return tuple(re.sub(re.escape(tag), lambda _: f"Image {next(numbers)}", option).strip() for option in options)
