"""The one reader of conversation files: .jsonl, .json and .parquet, with faulty records dropped or raised."""

import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from datasets import Dataset, Features, Json, List, Value
from tqdm.auto import tqdm

from ..conversation_visualchat import ROLES, drop_nulls, is_image, validate_conversation
from ..processing_visualchat import VisualChatProcessor
from .conversation import OUTSIDE, Conversation, Dropped
from .files import describe_json_error, parse_json, read_parquet
from .images import IMAGE_COLUMNS, MISSING_IMAGE, ImageReference
from .ingestion import IngestedRecord, check_record
from .lengths import count_tokens
from .schemas import ROLES as KNOWN_ROLES
from .schemas import convert_record


COLUMNS = ("messages", "conversations", *IMAGE_COLUMNS)

Reader = Callable[[BinaryIO, str], Iterator[tuple[str, Any]]]  # from a file and its name to places and records


def read_conversations(
    file: str | Path,
    image_folder: str | None = None,
    name: str | None = None,
    is_strict: bool = False,
    embed: bool = False,
) -> Iterator[IngestedRecord]:
    """
    Reads the conversations of a file, an absolute path or `hf://…`; image paths, relative to their folder, by default
    that of the file, become absolute. Images inside parquet rows become images of an archive, or inline with `embed`.

    A faulty record is yielded with its reason. `is_strict` raises a `ValueError` or `FileNotFoundError` instead, and
    lets image paths leave their folder, since the user named this very file. A broken file always raises.
    """
    file, name = str(file), name or str(file)
    suffix = os.path.splitext(file)[1]
    if suffix not in RECORDS:
        raise ValueError(f"{name} cannot be read; a file of conversations is one of {', '.join(RECORDS)}.")
    folder = image_folder or os.path.dirname(file)
    with fsspec.open(file, "rb") if "://" in file else open(file, "rb") as contents:
        for index, (place, record) in enumerate(RECORDS[suffix](contents, file)):
            where = f"{name}, {place}"
            if suffix == ".parquet":
                _refer_to_images(record, index, file, embed)
            if is_strict:
                _check_strictly(record, where)
            outcome = record if isinstance(record, Dropped) else convert_record(record)
            if isinstance(outcome, Conversation):
                outcome = _resolve_images(outcome, folder, file, is_confined=not is_strict)
            read = check_record(IngestedRecord(where, 1, outcome))
            if is_strict and isinstance(read.outcome, Dropped):
                error = FileNotFoundError if read.outcome.reason == MISSING_IMAGE else ValueError
                detail = read.outcome.detail or f"cannot be used: {read.outcome.reason}"
                raise error(f"{where} {detail.rstrip('.')}.")
            yield read


def _refer_to_images(record: dict, row: int, file: str, embed: bool) -> None:
    """Replaces encoded images in a row of a parquet file by references."""
    for column in IMAGE_COLUMNS:
        if record.get(column) is not None:
            values = record[column] if isinstance(record[column], list) else [record[column]]
            for number, value in enumerate(values):
                data = value.get("bytes") if isinstance(value, dict) else value
                if data and isinstance(data, bytes):
                    archived = ImageReference("archive", file, f"{row}.{number}")
                    values[number] = ImageReference.from_bytes(data) if embed else archived
            record[column] = values


def _resolve_images(outcome: Conversation, folder: str, file: str, is_confined: bool) -> Conversation | Dropped:
    resolved = {image: image.resolve(folder, file, is_confined) for image in outcome.images}
    if outside := tuple(image for image, found in resolved.items() if found is None):
        return replace(OUTSIDE, images=outside)
    return outcome.map_images(lambda image: resolved[image] or image)


def _check_strictly(record: Any, where: str) -> None:
    """The faults that conversion would repair or name only by their kind, in a record of the project's own schema."""
    if isinstance(record, Dropped):
        raise ValueError(f"{where} {record.detail}.")
    if isinstance(record, dict) and record.keys() & {"conversations", *IMAGE_COLUMNS}:
        return
    if isinstance(record, dict) and "messages" not in record:
        raise ValueError(f"{where} has no messages; it has the keys {', '.join(record) or 'of an empty record'}.")
    messages = record["messages"] if isinstance(record, dict) else record
    roles = [message.get("role") for message in messages or () if isinstance(message, dict)]
    if isinstance(messages, str) or any(role not in ROLES and str(role).lower() in KNOWN_ROLES for role in roles):
        return
    messages = drop_nulls(messages)
    validate_conversation(messages, name=where)
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"{where} does not end with an answer of the assistant, so there is nothing to learn.")
    for block in (block for message in messages for block in message["content"]):
        if is_image(block) and ImageReference.from_block(block) is None:
            raise ValueError(f"{where} has an image without a path, url or base64 text: {block!r:.80}.")


def _read_lines(contents: BinaryIO, name: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(contents, start=1):
        if line.strip():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                kind = "UTF-8" if isinstance(error, UnicodeDecodeError) else "JSON"
                record = Dropped(f"a line that is not {kind}", describe_json_error(error))
            yield f"line {number}", record


def _read_list(contents: BinaryIO, name: str) -> Iterator[tuple[str, Any]]:
    data = contents.read()
    first, _, rest = data.strip().partition(b"\n")
    if first.startswith(b"{") and first.endswith(b"}") and rest:  # JSON lines under another name
        yield from _read_lines(io.BytesIO(data), name)
        return
    records = parse_json(data, name)
    if not isinstance(records, list):
        raise ValueError(f"{name} is not a list of records at its top, but a {type(records).__name__}.")
    yield from ((f"record {index}", record) for index, record in enumerate(records))


def _read_parquet(contents: BinaryIO, name: str) -> Iterator[tuple[str, Any]]:
    return ((f"row {row}", record) for row, record in enumerate(read_parquet(contents, name, COLUMNS)))


RECORDS: dict[str, Reader] = {".jsonl": _read_lines, ".json": _read_list, ".parquet": _read_parquet}


def load_conversations(
    path: str | Path,
    processor: VisualChatProcessor,
    max_length: int | None = None,
    check_images: bool = True,
    check_length: bool = True,
) -> Dataset:
    r"""
    Reads a file (.jsonl, .json or .parquet) in which every fault is an error, so that it is found before training.

    Args:
        path (`str` or `Path`): A file of a schema in `schemas.py`; image paths are relative to its folder.
        processor (`VisualChatProcessor`): The processor of the model, for the lengths.
        max_length (`int`, *optional*): Maximum tokens of a conversation; by default the model's.
        check_images (`bool`, *optional*, defaults to `True`): Opens every image once, except URLs.
        check_length (`bool`, *optional*, defaults to `True`): Refuses over-length conversations.

    Returns:
        `datasets.Dataset` with the columns `messages` (image paths absolute) and `where` (file and record).

    Raises:
        `FileNotFoundError`: the file, or an image that it names, does not exist.
        `ValueError`: a faulty record, a broken image or an over-length conversation, by name; or no conversation.
    """
    path = Path(os.path.abspath(path))
    if not path.is_file():
        raise FileNotFoundError(f"No data file at {path}.")
    limit = min(max_length or processor.tokenizer.model_max_length, processor.tokenizer.model_max_length)
    conversations: list[list[dict]] = []
    places: list[list[str]] = []
    opened: set[ImageReference] = set()
    records = read_conversations(path, is_strict=True)
    for record in tqdm(records, desc=f"Checking {path.name}", unit="conversation"):
        conversation: Any = record.outcome
        messages = conversation.messages()
        for image in conversation.images if check_images else ():
            if image.kind != "url" and image not in opened:
                try:
                    image.open()
                except (ValueError, OSError) as error:
                    raise ValueError(f"{record.where}: {error}") from error
                opened.add(image)
        if check_length and (num_tokens := count_tokens(messages, processor)) > limit:
            raise ValueError(
                f"{record.where} has {num_tokens} tokens, {processor.image_seq_length} for an image; at most {limit} "
                "are read. Leave out rounds or images: a cut could go through an image."
            )
        conversations.append(messages)
        places.append([record.where])
    if not conversations:
        raise ValueError(f"{path} holds no conversation; write one on every line.")
    features = Features({"messages": Json(), "where": List(Value("string"))})
    return Dataset.from_dict({"messages": conversations, "where": places}, features=features)
