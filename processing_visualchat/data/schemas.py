"""
The supported schemas of custom datasets, converted to the conversation record by one pure function.

    {"messages": [{"role": "user", "content": "…" or [{"type": "text", …}, {"type": "image", …}]}, …]}     ours, OpenAI
    {"messages": [… "content": "<image> What is it?" …], "images": ["a.png"]}                     tags or empty blocks
    {"conversations": [{"from": "human", "value": "<image>\nWhat is it?"}, …], "image": "a.png"}    LLaVA, ShareGPT
    {"texts": [{"user": "…", "assistant": "…"}, …], "images": […]}                                  the Cauldron
    {"prompt": …, "completion": …}                                                                  TRL
    {"query": "…", "response": "…", "history": [["…", "…"], …]}                                     ms-swift
    {"instruction": "…", "input": "…", "output": "…"}                                               Alpaca

A bare list of messages is supported too. `system` is the system message, and an answer with `weight: 0` or `loss:
false` has no loss. An image is a path, a URL, base64 text (`data:` or not), encoded bytes, or an image of an archive.
A faulty record is either repaired, which is noted, or dropped with the reason; so is a record with media or
placeholders that are not understood.
"""

import contextlib
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from .conversation import NO_QUESTION, Conversation, Dropped, Turn, pair_turns
from .images import ImageReference


ROLES = {
    "system": "system",
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "chatgpt", "bot"), "assistant"),
}
IMAGE_TAG = "<image>"
PAIRS = {"response": "query", "output": "instruction", "completion": "prompt", "answer": "question"}
KNOWN_KEYS = {"messages", "conversations", "texts", "system", "history", "input", "label", *PAIRS, *PAIRS.values()}
LOSS_KEYS = ("weight", "loss", "train")
# What a mixture's `columns` can call a column or, for the last but one, a piece of text.
FIELDS = ("messages", "images", "system", "question", "answer", "history", "placeholder", "ignored")

IMAGE_KEY = re.compile(r"images?(?:[_-]?(\d+))?")
UNREAD_IMAGE_KEY = re.compile(r"(?:img|image|picture|photo)s?(?:_?(?:path|file|file_?name|url|base64|bytes)s?)?")
UNREAD_MEDIA_KEY = re.compile(r"(?:video|audio|speech|sound|point_?cloud)s?(?:_?(?:path|file|url)s?)?(?:[_-]?\d+)?")
PLACEHOLDER = re.compile(
    r"(?:Picture \d+: ?)?<img>(?P<path>[^<>]+)</img>|<\|?image[ _-]?(?P<number>\d+)\|?>|<\|?image\|?>|<ImageHere>"
    r"|<image_placeholder>|(?:<\|vision_start\|>)?<\|image_pad\|>(?:<\|vision_end\|>)?"
)
UNREAD_PLACEHOLDER = re.compile(
    r"</?\|?(?:video|audio|speech|sound|media|image|img|vision|ref|object_ref|box|bbox|quad|point|loc|seg)"
    r"(?:[_-][\w-]+)?\d*\|?>",
    re.IGNORECASE,
)


def is_known(key: str) -> bool:
    """Whether a key of a record has a meaning here."""
    patterns = (IMAGE_KEY, UNREAD_IMAGE_KEY, UNREAD_MEDIA_KEY)
    return key in KNOWN_KEYS or any(pattern.fullmatch(key) for pattern in patterns)


class Slot(NamedTuple):
    """A place for an image of the record: the next one, or the one with a number."""

    number: int | None = None


class Fault(Exception):
    """Why a record is dropped."""


def convert_record(
    record: Any, columns: Mapping[str, str] | None = None, ends_with_question: bool = False
) -> Conversation | Dropped:
    """
    A record of a supported schema as a conversation, with other names for its columns; it stays as it is. With
    `ends_with_question`, the conversation is one to be answered: an answer to its last question is left out.
    """
    record = {"messages": record} if isinstance(record, list) else record
    try:
        named = _rename(record, columns or {}) if isinstance(record, dict) else {}
        return _convert(named, columns or {}, ends_with_question)
    except Fault as fault:
        return Dropped(*fault.args)


def _convert(record: dict, columns: Mapping[str, str], ends_with_question: bool) -> Conversation | Dropped:
    raw, has_tags = _find_turns(record, ends_with_question)
    if not raw:
        keys = ", ".join(map(str, record)) or "of an empty record"
        raise Fault("no messages and no conversations", f"has no messages; it has the keys {keys}")
    while ends_with_question and _find_role(raw[-1]) == "assistant":
        if not (raw := raw[:-1]):
            return NO_QUESTION
    given = [key for key, value in record.items() if _is_given(value)]
    _check_keys(UNREAD_MEDIA_KEY, given)
    if record.get("label") is False and "completion" in given and not ends_with_question:
        raise Fault("an answer marked as not wanted")
    placeholders = [text for text, field in columns.items() if field == "placeholder"]
    turns = [_read_turn(turn, placeholders) for turn in raw]
    repairs: list[str] = []
    _add_system(turns, record.get("system"), repairs)
    _fill_slots(turns, _read_images(record, given), repairs, has_tags)
    outcome = pair_turns(turns, repairs, ends_with_question)
    if isinstance(outcome, Dropped):
        return outcome
    if None in outcome.images:
        fault = "an image without a path, a URL or base64 text"
        raise Fault(fault, f"has {fault}")
    if not outcome.images:
        _check_keys(UNREAD_IMAGE_KEY, given)
    has_loss = any(turn.has_loss for turn in outcome.turns if turn.role == "assistant")
    if not has_loss and not ends_with_question:
        raise Fault("no answer with a loss")
    return outcome


def _check_keys(unread: re.Pattern, given: list[str]) -> None:
    if key := next(filter(unread.fullmatch, given), None):
        raise Fault(f"the key {key}, which is not read")


def check_columns(columns: Any, source: str) -> None:
    """A `ValueError` if other names for columns are not a dict to [`FIELDS`]."""
    if not isinstance(columns, dict) or not all(isinstance(name, str) and name for name in columns):
        raise ValueError(f"columns of {source} is {columns!r}; use names in the file, each with one of {FIELDS}.")
    if unknown := sorted({str(field) for field in columns.values() if field not in FIELDS}):
        raise ValueError(f"columns of {source} has the unknown {', '.join(unknown)}; use one of {', '.join(FIELDS)}.")


def _rename(record: dict, columns: Mapping[str, str]) -> dict:
    """The record with the names of the supported schemas; several columns of images become one."""
    renamed = {key: value for key, value in record.items() if key not in columns}
    for key, field in columns.items():
        if field == "images" and record.get(key) is not None:
            renamed[field] = [*as_list(renamed.get(field) or []), *as_list(record[key])]
        elif field in FIELDS[:-2] and key in record:
            renamed[field] = record[key]
    return renamed


def _is_given(value: Any) -> bool:
    """Whether a value holds anything: `datasets` fills what a record lacks with nulls."""
    parts = value.values() if isinstance(value, dict) else value
    return any(map(_is_given, parts)) if isinstance(value, (dict, list, tuple)) else value not in (None, "", False)


def as_list(value: Any) -> list:
    """Several values, or one."""
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _find_turns(record: dict, ends_with_question: bool) -> tuple[list, bool]:
    """The raw turns, and whether their text marks where images are."""
    for key in ("messages", "conversations"):
        if isinstance(turns := _parse_json(record.get(key)), list) and turns:
            return turns, True
    if isinstance(texts := _parse_json(record.get("texts")), list):
        rounds = [(pair.get("user"), pair.get("assistant")) if isinstance(pair, dict) else (pair,) for pair in texts]
        return [turn for pair in rounds for turn in _as_turns(*pair)], False
    pairs = ((record.get(question) or [], record.get(answer) or []) for answer, question in PAIRS.items())
    question, answer = next((pair for pair in pairs if pair[0] and (pair[1] or ends_with_question)), ([], []))
    if isinstance(question, str) and isinstance(record.get("input"), str):
        question = f"{question}\n{record['input']}".strip()
    history = record["history"] if isinstance(record.get("history"), list) else []
    return [turn for pair in (*history, (question, answer)) for turn in _as_turns(*as_list(pair))], False


def _as_turns(*pair: Any) -> list:
    """Question and answer as turns; each may already be turns, in whose question no answer has a loss."""
    turns: list = []
    for role, value in zip(("user", "assistant"), pair):
        if isinstance(value, list) and role == "user":
            turns += [{**turn, "weight": 0} if isinstance(turn, dict) else turn for turn in value]
        else:
            turns += value if isinstance(value, list) else [{"role": role, "content": value}]
    return turns


def _parse_json(turns: Any) -> Any:
    """Messages, which may be JSON text."""
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(turns) if isinstance(turns, str) else turns


def _read_images(record: dict, given: list[str]) -> list:
    """The images of the record, from one column of several or from several, in the order of their numbers."""
    numbers = {key: int(match[1] or -1) for key in given if (match := IMAGE_KEY.fullmatch(key))}
    lists = {key: as_list(record[key]) for key in sorted(numbers, key=numbers.__getitem__)}
    many = lists.pop("images", [])
    single = [image for images in lists.values() for image in images]
    if all(image in many for image in single):
        return many
    if all(image in single for image in many):
        return single
    raise Fault(f"different images in the columns images, {', '.join(lists)}")


def _find_role(turn: Any) -> str | None:
    return ROLES.get(str(turn.get("role") or turn.get("from")).lower()) if isinstance(turn, dict) else None


def _read_turn(turn: Any, placeholders: list[str]) -> Turn:
    """Role and content, with slots for images to be filled in: empty blocks, or placeholders in the text."""
    unknown = Fault("a turn without a known role or without content")
    if not isinstance(turn, dict):
        raise unknown
    role = _find_role(turn)
    content = turn.get("value") if turn.get("content") is None else turn["content"]
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if role is None or not isinstance(blocks, list):
        raise unknown
    read: list[Any] = []
    for block in blocks:
        block_type = block.get("type") if isinstance(block, dict) else None
        if block_type == "text" and isinstance(block.get("text"), str):
            read += _split_text(block["text"], placeholders)
        elif block_type in ("image", "image_url"):
            image = ImageReference.from_block(block)
            read.append(_read_slot(block) if image is None else image)
        else:
            raise Fault(f"a block of type {block_type!r:.40}") if block_type else unknown
    words = [index for index, block in enumerate(read) if isinstance(block, str)]
    if words:
        read[words[0]] = read[words[0]].lstrip()
        read[words[-1]] = read[words[-1]].rstrip()
    for text in (block for block in read if isinstance(block, str)):
        if found := UNREAD_PLACEHOLDER.search(text):
            raise Fault(f"the placeholder {found[0]}, which is not read")
    weights = [turn[key] for key in LOSS_KEYS if role == "assistant" and turn.get(key) is not None]
    if any(weight not in (0, 1) for weight in weights):
        raise Fault("an answer with a weight other than 0 and 1")
    return Turn(role, read, all(weights))


def _read_slot(block: dict) -> Slot | None:
    """The slot of a block without an image, whose index counts from 0; `None` if it names one in an unknown way."""
    index = block.get("index")
    if any(_is_given(value) for key, value in block.items() if key not in ("type", "index")):
        return None
    return Slot() if index is None else Slot(index + 1) if isinstance(index, int) and index >= 0 else None


def _split_text(text: str, placeholders: list[str]) -> list:
    """Text, and slots or images for its placeholders; without white space at the ends or alone."""
    for placeholder in placeholders:
        text = text.replace(placeholder, IMAGE_TAG)
    text, start = text.strip(), 0
    pieces: list[Any] = []
    for match in PLACEHOLDER.finditer(text):
        number = match["number"] and Slot(int(match["number"]))
        image = ImageReference.parse(match["path"]) if match["path"] else number or Slot()
        pieces += [text[start : match.start()], image]
        start = match.end()
    return [piece for piece in (*pieces, text[start:]) if not isinstance(piece, str) or piece.strip()]


def _add_system(turns: list[Turn], system: Any, repairs: list[str]) -> None:
    """Puts the system message of the record before its turns, if they have none."""
    if system and not isinstance(system, str):
        raise Fault("a system message that is not text")
    if system and system.strip():
        if turns[0].role != "system":
            turns.insert(0, Turn("system", [system.strip()]))
        elif turns[0].content != [system.strip()]:
            repairs.append("a system message beside the messages left out")


def _fill_slots(turns: list[Turn], images: list, repairs: list[str], has_tags: bool) -> None:
    """Fills the images of a record into its slots, or before the first question if there are none."""
    references: list[Any] = [ImageReference.from_source(image) for image in images]
    shown = [block for turn in turns for block in turn.content if not isinstance(block, str)]
    slots: list[Any] = [block for block in shown if isinstance(block, Slot)]
    if shown and not slots:
        if references not in ([], shown):
            raise Fault("images in the messages and others beside them")
        return
    if not slots:
        first = next((turn for turn in turns if turn.role == "user"), turns[0])
        first.content[:0] = references
        repairs += ["images without an <image> tag put in front"] if has_tags and references else []
        return
    order = [slot.number for slot in slots]
    if set(order) != {None}:
        order = [number and number - (0 not in order) for number in order]  # they count from 0 or 1
    elif len(references) == 1 < len(slots):
        order = [0]
        repairs.append("a repeated <image> tag left out")
    else:
        order = list(range(len(slots)))
    if len(slots) < len(shown) or set(order) != set(range(len(references))):
        detail = (
            f"has {len(slots)} places for images, {len(set(order))} of them different, and {len(references)} images"
        )
        raise Fault("images and <image> tags of different number", detail)
    remaining = iter([references[index] for index in order])
    for turn in turns:
        filled = [next(remaining, "") if isinstance(block, Slot) else block for block in turn.content]
        turn.content[:] = [block for block in filled if block != ""]
