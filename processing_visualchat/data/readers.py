"""The one reader of conversation files, with faulty records dropped or raised."""

import io
import itertools
import json
import mimetypes
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from datasets import Dataset, Features, Json, List, Value
from tqdm.auto import tqdm

from ..processing_visualchat import VisualChatProcessor
from .conversation import OUTSIDE, Conversation, Dropped
from .files import describe_json_error, open_file, parse_json, read_table, suffix_of
from .images import MISSING_IMAGE, ImageReference, digest_pixels, may_hold, replace_encoded
from .ingestion import IngestedRecord, check_record, to_text
from .schemas import IMAGE_KEY, as_list, convert_record, is_known


KEYS = ("id", "key")  # of a record, for the id that it gives itself

# From a file, its name and the columns that have other names, to places and records.
Reader = Callable[[BinaryIO, str, Container[str]], Iterator[tuple[str, Any]]]


def read_conversations(
    file: str | Path,
    image_root: str | None = None,
    name: str | None = None,
    is_strict: bool = False,
    embed: bool = False,
    columns: Mapping[str, str] | None = None,
    links: str = "",
    control_tokens: Sequence[str] = (),
    ends_with_question: bool = False,
    extra: Sequence[str] = (),
) -> Iterator[IngestedRecord]:
    """
    Reads the conversations of a file, an absolute path or `hf://…`; image paths, relative to `image_root`, by default
    the folder of the file, become absolute, and none leads out of it, see [`ImageReference.resolve`]. Images inside of
    tables become images of an archive, or inline with `embed`. `columns` are other names, and `ends_with_question`
    is for conversations to be answered, see [`convert_record`]. No text may hold one of `control_tokens`. Fields named
    in `extra` are handed on.

    A faulty record is yielded with its reason. `is_strict` raises a `ValueError` or `FileNotFoundError` instead, also
    for what would be repaired. A broken file always raises.
    """
    file, name = str(file), name or str(file)
    suffix = suffix_of(file)
    if suffix not in RECORDS:
        raise ValueError(f"{name} cannot be read; a file of conversations is one of {', '.join(RECORDS)}.")
    root = image_root or os.path.dirname(file)
    with open_file(file) as contents:
        records = RECORDS[suffix](contents, file, {*(columns or ()), *extra})
        for index, (place, record) in enumerate(_read_whole(records, name)):
            where = f"{name}, {place}"
            if suffix in TABLES and not embed:
                names = (f"{index}.{number}" for number in itertools.count())
                record = replace_encoded(record, partial(_refer, file, names))
            outcome = record if isinstance(record, Dropped) else convert_record(record, columns, ends_with_question)
            if isinstance(outcome, Conversation):
                outcome = _resolve_images(outcome, root, file, links)
            found = {key: value for key, value in record.items() if key in extra} if isinstance(record, dict) else {}
            read = IngestedRecord(where, 1, outcome, key=_find_key(record), extra=found)
            read = check_record(read, control_tokens=control_tokens)
            if is_strict:
                _raise_faults(read)
            yield read


def _find_key(record: Any) -> str | int | None:
    keys = [record.get(name) for name in KEYS] if isinstance(record, dict) else []
    key = next((key for key in keys if isinstance(key, (str, int)) and key != ""), None)
    return to_text(key) if isinstance(key, str) else key


def _refer(file: str, names: Iterator[str], data: bytes) -> ImageReference:
    return ImageReference("archive", file, next(names))


def _read_whole(records: Iterator[tuple[str, Any]], name: str) -> Iterator[tuple[str, Any]]:
    """Records of a file that may be compressed; a `ValueError` if its compression is broken."""
    try:
        yield from records
    except (EOFError, OSError, zlib.error, tarfile.TarError) as error:
        raise ValueError(f"{name} is not a whole file: {error}. Was the download complete?") from error


def _resolve_images(outcome: Conversation, root: str, file: str, links: str) -> Conversation | Dropped:
    resolved = {image: image.resolve(root, file, links) for image in outcome.images}
    if outside := tuple(image for image, found in resolved.items() if found is None):
        return replace(OUTSIDE, images=outside)
    return outcome.map_images(lambda image: resolved[image] or image)


def _raise_faults(read: IngestedRecord) -> None:
    """Raises what is wrong with a record, or what was repaired in it."""
    if isinstance(read.outcome, Dropped):
        error = FileNotFoundError if read.outcome.reason == MISSING_IMAGE else ValueError
        raise error(f"{read.where} {read.outcome.predicate}.")
    if read.outcome.repairs:
        raise ValueError(f"{read.where} would need a repair: {', '.join(read.outcome.repairs)}.")


def _read_lines(contents: BinaryIO, name: str, columns: Container[str] = ()) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(contents, start=1):
        if line.strip():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                kind = "UTF-8" if isinstance(error, UnicodeDecodeError) else "JSON"
                record = Dropped(f"a line that is not {kind}", describe_json_error(error))
            yield f"line {number}", record


def _read_list(contents: BinaryIO, name: str, columns: Container[str] = ()) -> Iterator[tuple[str, Any]]:
    data = contents.read()
    first, _, rest = data.strip().partition(b"\n")
    if first.startswith(b"{") and first.endswith(b"}") and rest:  # JSON lines under another name
        yield from _read_lines(io.BytesIO(data), name)
        return
    records = parse_json(data, name)
    if not isinstance(records, list):
        raise ValueError(f"{name} is not a list of records at its top, but a {type(records).__name__}.")
    yield from ((f"record {index}", record) for index, record in enumerate(records))


def _read_rows(contents: BinaryIO, name: str, columns: Container[str] = ()) -> Iterator[tuple[str, Any]]:
    rows = read_table(contents, name, lambda field: is_known(field.name) or field.name in columns or may_hold(field))
    return ((f"row {row}", record) for row, record in enumerate(rows))


def _read_tar(contents: BinaryIO, name: str, columns: Container[str] = ()) -> Iterator[tuple[str, Any]]:
    """The samples of a WebDataset: files with one name up to its first dot, of which one is the record as JSON."""
    with tarfile.open(fileobj=contents, mode="r|") as archive:
        files = ((member.name, archive.extractfile(member)) for member in archive if member.isfile())
        samples = itertools.groupby(files, lambda file: re.sub(r"\.[^/]*$", "", file[0]))
        for key, members in samples:
            record: Any = {}
            media: dict[str, dict[str, bytes]] = {"image": {}, "video": {}, "audio": {}}
            for path, file in members:
                data = file.read() if file else b""
                kind = (mimetypes.guess_type(path)[0] or "").partition("/")[0]
                if kind in media:
                    media[kind][os.path.basename(path)] = data
                elif path.endswith(".json"):
                    record = parse_json(data, f"{name}, {path}")
            yield f"sample {key}", _fill_sample(record, media)


def _fill_sample(record: Any, media: dict[str, dict[str, bytes]]) -> Any:
    """The record of a sample with its files: those that it names by their names, or else all in their order."""
    if not isinstance(record, dict):
        return record
    images = media["image"]
    named = {key: value for key, value in record.items() if IMAGE_KEY.fullmatch(key)}
    names = [os.path.basename(name) for value in named.values() for name in as_list(value) if isinstance(name, str)]
    if images:
        record = {key: value for key, value in record.items() if key not in named}
        record["images"] = [images[name] for name in names] if set(names) == set(images) else list(images.values())
    return record | {kind: list(files) for kind, files in media.items() if files and kind != "image"}


TABLES: dict[str, Reader] = {".parquet": _read_rows, ".arrow": _read_rows}
RECORDS: dict[str, Reader] = {".jsonl": _read_lines, ".json": _read_list, ".tar": _read_tar, **TABLES}


def load_conversations(
    path: str | Path,
    processor: VisualChatProcessor,
    check_images: bool = True,
    image_root: str | Path | None = None,
) -> Dataset:
    r"""
    Reads a file in which every fault is an error, even one that could be repaired: it is found before training.

    Args:
        path (`str` or `Path`): A file of a schema in `schemas.py`: .jsonl, .json, .parquet, .arrow or the .tar of a
            WebDataset, also compressed.
        processor (`VisualChatProcessor`): The processor of the model, whose special tokens no text may hold.
        check_images (`bool`, *optional*, defaults to `True`): Opens every image once, except URLs.
        image_root (`str` or `Path`, *optional*): The folder that image paths are relative to and do not leave; by
            default that of the file.

    Returns:
        `datasets.Dataset` with the columns `messages` (image paths absolute), `where` (file and record) and `digests`
        (of the different images: of their pixels, or of the names of those that were not opened).

    Raises:
        `FileNotFoundError`: the file, or an image that it names, does not exist.
        `ValueError`: a faulty record or a broken image, by name; or no conversation.
    """
    path = Path(os.path.abspath(path))
    if not path.is_file():
        raise FileNotFoundError(f"No data file at {path}.")
    conversations: list[list[dict]] = []
    places: list[list[str]] = []
    digests: list[list[str]] = []
    opened: dict[ImageReference, str] = {}
    root, tokens = os.path.abspath(image_root or path.parent), processor.control_tokens
    records = read_conversations(path, root, is_strict=True, control_tokens=tokens)
    for record in tqdm(records, desc=f"Checking {path.name}", unit="conversation"):
        conversation: Any = record.outcome
        for image in conversation.images if check_images else ():
            if image.kind != "url" and image not in opened:
                try:
                    opened[image] = digest_pixels(image.open())
                except (ValueError, OSError) as error:
                    raise ValueError(f"{record.where}: {error}") from error
        conversations.append(conversation.messages())
        places.append([record.where])
        shown = (opened.get(image) or image.digest_name() for image in conversation.images)
        digests.append([*dict.fromkeys(shown)])
    if not conversations:
        raise ValueError(f"{path} holds no conversation; write one on every line.")
    texts = List(Value("string"))
    features = Features({"messages": Json(), "where": texts, "digests": texts})
    return Dataset.from_dict({"messages": conversations, "where": places, "digests": digests}, features=features)
