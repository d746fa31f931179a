"""Reads conversations from JSON lines: one conversation a line, its image paths relative to the file."""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm

from .conversation_visualchat import ROLES, drop_nulls, image_source, is_image, validate_conversation
from .image_loading_visualchat import load_image
from .processing_visualchat import VisualChatProcessor
from .record_shapes import ROLES as OTHER_ROLES
from .record_shapes import convert_record
from .source_converters import Dropped


def load_conversations(
    path: str | Path,
    processor: VisualChatProcessor,
    max_length: int | None = None,
    check_images: bool = True,
    check_length: bool = True,
) -> Dataset:
    r"""
    Reads and checks a file of conversations, so that what is wrong with one is found before training starts.

    Args:
        path (`str` or `Path`): JSON lines, each `{"messages": [{"role": …, "content": …}, …]}`, the bare list, or
            another of the shapes in `record_shapes.py`.
        processor (`VisualChatProcessor`): That of the model, by which the lengths are measured.
        max_length (`int`, *optional*): The most tokens that a conversation may have; by default what the model reads.
        check_images (`bool`, *optional*, defaults to `True`): Opens every image once; if not, a file has to be there.
        check_length (`bool`, *optional*, defaults to `True`): Refuses what is too long; if not, the collator has to
            shorten it.

    Returns:
        `datasets.Dataset` with a column `messages`, each a JSON text (messages have no common schema); image paths
        are absolute.

    Raises:
        `FileNotFoundError`: the file, or an image that it names, is not there.
        `ValueError`: a line that cannot be read, a conversation that is not valid, has no answer or is too long, or an
            image that is broken, each with file and line number; or no conversation at all.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No data file at {path}.")
    max_length = min(max_length or processor.tokenizer.model_max_length, processor.tokenizer.model_max_length)
    conversations: list[str] = []
    checked: set[str] = set()
    with path.open("rb") as lines:
        for number, line in enumerate(tqdm(lines, desc=f"Checking {path.name}", unit="line"), start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            messages = _parse(line, where)
            validate_conversation(messages, processor.image_token, where)
            if messages[-1]["role"] != "assistant":
                raise ValueError(
                    f"{where} does not end with an answer of the assistant, so there is nothing to learn."
                )
            sources = _resolve_image_sources(messages, path.parent, where)
            for source in sources if check_images else ():
                if source not in checked:
                    _check_image(source, where)
                    checked.add(source)
            if check_length:
                _check_length(messages, processor, max_length, where)
            conversations.append(json.dumps(messages))
    if not conversations:
        raise ValueError(f"{path} holds no conversation; write one on every line.")
    return Dataset.from_dict({"messages": conversations})


def _parse(line: bytes, where: str) -> list[dict]:
    try:
        record: Any = json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 text: {error.reason} at byte {error.start}.") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error.msg} at column {error.colno}.") from error
    if _is_of_another_shape(record):
        outcome = convert_record(record)
        if isinstance(outcome, Dropped):
            raise ValueError(f"{where} cannot be used: {outcome.reason}.")
        return outcome.messages()
    if isinstance(record, dict) and "messages" not in record:
        raise ValueError(f"{where} has no messages; it has the keys {', '.join(record) or 'of an empty record'}.")
    return drop_nulls(record["messages"] if isinstance(record, dict) else record)


def _is_of_another_shape(record: Any) -> bool:
    if isinstance(record, dict) and record.keys() & {"conversations", "images", "image"}:
        return True
    messages = record.get("messages") if isinstance(record, dict) else record
    roles = [message.get("role") for message in messages or () if isinstance(message, dict)]
    return any(role not in ROLES and str(role).lower() in OTHER_ROLES for role in roles)


def _resolve_image_sources(messages: list[dict], folder: Path, where: str) -> list[str]:
    """Makes image paths absolute, in place, and returns what every image is to be read from."""
    sources = []
    for message in messages:
        for block in message["content"] if not isinstance(message["content"], str) else ():
            if not is_image(block):
                continue
            source = image_source(block)
            if not isinstance(source, str):
                raise ValueError(f"{where} has an image without a path, url or base64 text: {block!r:.80}.")
            if "base64" not in block and not source.startswith(("http://", "https://", "data:")):
                image_path = (folder / source.removeprefix("file://")).resolve()
                if not image_path.is_file():
                    raise FileNotFoundError(f"{where} names the image {source}; there is no file at {image_path}.")
                source = str(image_path)
                block.clear()
                block.update(type="image", path=source)
            sources.append(source)
    return sources


def _check_image(source: str, where: str) -> None:
    if source.startswith(("http://", "https://")):
        return  # fetched when it is needed
    try:
        load_image(source)
    except (ValueError, OSError) as error:
        raise ValueError(f"{where}: {error}") from error


def count_tokens(messages: list[dict], processor: VisualChatProcessor) -> int:
    """The tokens of a conversation, those of its images included; no image is opened."""
    text = processor.apply_chat_template(messages)
    return len(processor.tokenizer(text, verbose=False)["input_ids"]) + text.count(processor.image_token) * (
        processor.image_seq_length - 1
    )


def _check_length(messages: list[dict], processor: VisualChatProcessor, max_length: int, where: str):
    num_tokens = count_tokens(messages, processor)
    if num_tokens > max_length:
        raise ValueError(
            f"{where} has {num_tokens} tokens, {processor.image_seq_length} for an image; at most {max_length} are "
            "read. Leave out rounds or images: a cut could go through an image."
        )
