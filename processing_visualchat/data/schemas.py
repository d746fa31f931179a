"""
The supported schemas of custom datasets, converted to the conversation record by one pure function.

    {"messages": [{"role": "user", "content": "…" or [{"type": "text", …}, {"type": "image", …}]}, …]}     ours, OpenAI
    {"messages": [… "content": "<image> What is it?" …], "images": ["a.png"]}                     tags or empty blocks
    {"conversations": [{"from": "human", "value": "<image>\nWhat is it?"}, …], "image": "a.png"}    LLaVA, ShareGPT

A bare list of messages is supported too. An image is a path, a URL, base64 text (`data:` or not), or an image of an
archive. A faulty record is either repaired, which is noted, or dropped with the reason.
"""

import contextlib
import json
from typing import Any

from .conversation import Conversation, Dropped, Turn, pair_turns
from .images import ImageReference


ROLES = {
    "system": "system",
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "chatgpt", "bot"), "assistant"),
}
IMAGE_TAG = "<image>"


def convert_record(record: Any) -> Conversation | Dropped:
    """A record of a supported schema as a conversation; the record stays as it is."""
    turns: Any = record
    images: list = []
    if isinstance(record, dict):
        candidates = (_parse_messages(record[key]) for key in ("messages", "conversations") if record.get(key))
        turns = next((turns for turns in candidates if isinstance(turns, list) and turns), None)
        images = next((record[key] for key in ("images", "image") if record.get(key)), [])
        images = list(images) if isinstance(images, (list, tuple)) else [images]
    if not isinstance(turns, list) or not turns:
        return Dropped("no messages and no conversations")
    read = [turn for turn in (_read_turn(turn, bool(images)) for turn in turns) if turn is not None]
    if len(read) < len(turns):
        return Dropped("a turn without a known role or without content")
    repairs: list[str] = []
    if images and (reason := _fill_slots(read, images, repairs)) is not None:
        return Dropped(reason)
    outcome = pair_turns(read, repairs)
    if isinstance(outcome, Conversation) and None in outcome.images:
        return Dropped("an image without a path, a URL or base64 text")
    return outcome


def _parse_messages(turns: Any) -> Any:
    """Messages, which may be JSON text."""
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(turns) if isinstance(turns, str) else turns


def _read_turn(turn: Any, has_images: bool) -> Turn | None:
    """Role and content; `None` for an image to be filled in: an empty block, or a tag if the record has images."""
    if not isinstance(turn, dict):
        return None
    role = ROLES.get(str(turn.get("role") or turn.get("from")).lower())
    content = turn.get("value") if turn.get("content") is None else turn["content"]
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if role is None or not isinstance(blocks, list):
        return None
    read: list[Any] = []
    for block in blocks:
        block_type = block.get("type") if isinstance(block, dict) else None
        if block_type == "text" and isinstance(block.get("text"), str):
            for number, piece in enumerate(block["text"].split(IMAGE_TAG) if has_images else [block["text"]]):
                read += [None, piece.strip()] if number else [piece.strip()]
        elif block_type in ("image", "image_url"):
            read.append(ImageReference.from_block(block))
        else:
            return None
    return Turn(role, [block for block in read if block != ""])


def _fill_slots(turns: list[Turn], images: list, repairs: list[str]) -> str | None:
    """Fills the images of a record into its slots; or returns the reason why that is impossible."""
    references: list[Any] = [ImageReference.from_source(image) for image in images]
    shown = [block for turn in turns for block in turn.content if not isinstance(block, str)]
    num_slots = sum(block is None for block in shown)
    if shown and not num_slots:
        return None if shown == references else "images in the messages and others beside them"
    if not shown:
        first = next((turn for turn in turns if turn.role == "user"), turns[0])
        first.content[:0] = references
        repairs.append("images without an <image> tag put in front")
        return None
    if len(references) == 1 < num_slots:
        repairs.append("a repeated <image> tag left out")
    elif len(references) != num_slots:
        return "images and <image> tags of different number"
    remaining = iter(references)
    for turn in turns:
        filled = [next(remaining, "") if block is None else block for block in turn.content]
        turn.content[:] = [block for block in filled if block != ""]
    return None
