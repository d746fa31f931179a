"""
The shapes in which people keep conversations of their own, to the one form that is read: one pure function.

    {"messages": [{"role": "user", "content": "…" or [{"type": "text", …}, {"type": "image", …}]}, …]}     ours, OpenAI
    {"messages": [… "content": "<image> What is it?" …], "images": ["a.png"]}                          tags, or empty
    {"conversations": [{"from": "human", "value": "<image>\nWhat is it?"}, …], "image": "a.png"}    LLaVA, ShareGPT

A bare list of messages is one too. An image is a path, an address, base64 text (`data:` or not), or a reference into
an archive. Whatever is odd about a record is either mended, and noted, or drops it.
"""

import contextlib
import copy
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .conversation_visualchat import image_source
from .image_archives import decode_image_text, digest_of
from .source_converters import Dropped


ROLES = {
    **dict.fromkeys(("system",), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "chatgpt", "bot"), "assistant"),
}
TAG = "<image>"


@dataclass(frozen=True)
class Messages:
    """
    Args:
        turns (`list[dict]`): Messages whose images are `{"type": "image", "path" or "url" or "base64": …}`.
        repairs (`tuple` of `str`): What was mended.
    """

    turns: list[dict]
    repairs: tuple[str, ...] = ()

    @property
    def system(self) -> Any:
        """The content of its system message, if it has one."""
        return self.turns[0]["content"] if self.turns[0]["role"] == "system" else None

    @property
    def blocks(self) -> Iterator[dict]:
        """All blocks, in order."""
        return (block for turn in self.turns for block in turn["content"] if not isinstance(turn["content"], str))

    @property
    def images(self) -> list[str]:
        """The names of the images in the order in which they are shown: paths, addresses, `inline:` and a digest."""
        return [
            f"inline:{digest_of(decode_image_text(block['base64']))}"
            if "base64" in block
            else block.get("path") or block["url"]
            for block in self.blocks
            if block["type"] == "image"
        ]

    def messages(self) -> list[dict]:
        """The one form of a conversation, see [`validate_conversation`]."""
        return copy.deepcopy(self.turns)


def convert_record(record: Any) -> Messages | Dropped:
    """A record of any of the shapes above."""
    turns: Any = record
    images: list = []
    if isinstance(record, dict):
        candidates = (_parsed(record[key]) for key in ("messages", "conversations") if record.get(key))
        turns = next((turns for turns in candidates if isinstance(turns, list) and turns), None)
        images = next((record[key] for key in ("images", "image") if record.get(key)), [])
        images = list(images) if isinstance(images, (list, tuple)) else [images]
    if not isinstance(turns, list) or not turns:
        return Dropped("no messages and no conversations")
    repairs: list[str] = []
    read = [_read_turn(turn, bool(images)) for turn in turns]
    if any(turn is None for turn in read):
        return Dropped("a turn without a known role or without content")
    turns = [turn for turn in read if turn is not None]
    if images and (reason := _fill_in(turns, images, repairs)) is not None:
        return Dropped(reason)
    messages = _take_turns(turns, repairs)
    if not messages:
        return Dropped("no question with an answer")
    blocks = [block for message in messages for block in message["content"]]
    if any(block["type"] == "image" and not isinstance(image_source(block), str) for block in blocks):
        return Dropped("an image without a path, an address or base64 text")
    return Messages([_as_plain(message) for message in messages], tuple(dict.fromkeys(repairs)))


def _read_turn(turn: Any, has_images: bool) -> dict | None:
    """Role and blocks; tags become blocks where the record has images of its own."""
    if not isinstance(turn, dict):
        return None
    role = ROLES.get(str(turn.get("role") or turn.get("from")).lower())
    content = turn.get("value") if turn.get("content") is None else turn["content"]
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if role is None or not isinstance(blocks, list):
        return None
    read: list[dict] = []
    for block in blocks:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "text" and isinstance(block.get("text"), str):
            read += _split_at_tags(block["text"]) if has_images else [{"type": "text", "text": block["text"].strip()}]
        elif kind in ("image", "image_url"):
            encoded = block.get("base64")
            is_encoded = isinstance(encoded, str) and bool(encoded)
            read.append({"type": "image", "base64": encoded} if is_encoded else _as_image(image_source(block)))
        else:
            return None
    return {"role": role, "content": [block for block in read if block["type"] == "image" or block["text"]]}


def _split_at_tags(text: str) -> list[dict]:
    pieces: list[dict] = []
    for number, piece in enumerate(text.split(TAG)):
        pieces += [{"type": "image"}] if number else []
        pieces.append({"type": "text", "text": piece.strip()})
    return pieces


def _parsed(turns: Any) -> Any:
    """Messages that are kept as JSON text."""
    if isinstance(turns, str):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(turns)
    return turns


def _as_image(source: Any) -> dict:
    source = source.get("path") if isinstance(source, dict) else source
    if not isinstance(source, str) or not source:
        return {"type": "image"}
    if source.startswith(("http://", "https://")):
        return {"type": "image", "url": source}
    if source.startswith("data:"):
        return {"type": "image", "base64": source}
    looks_encoded = len(source) > 255 and re.fullmatch(r"[A-Za-z0-9+/_\-\s]+=*\s*", source) is not None
    return {"type": "image", "base64" if looks_encoded else "path": source.removeprefix("file://")}


def _take_turns(turns: list[dict], repairs: list[str]) -> list[dict]:
    """A system message, and questions with their answers; what has no other half is left out, and noted."""
    messages = turns[:1] if turns[0]["role"] == "system" and turns[0]["content"] else []
    question: dict | None = None
    for turn in turns[1:] if turns[0]["role"] == "system" else turns:
        if turn["role"] == "system":
            repairs.append("a system message in the middle left out")
        elif turn["role"] == "user":
            if question is not None:
                repairs.append("questions in a row joined")
                turn = {"role": "user", "content": [*question["content"], *turn["content"]]}
            question = turn
        elif question is None or not question["content"]:
            repairs.append("an answer without a question left out")
            question = None
        elif not turn["content"]:
            repairs.append("a round without an answer left out")
            # Its images stay, so that "the second image" is still the second.
            images = [block for block in question["content"] if block["type"] == "image"]
            question = {"role": "user", "content": images} if images else None
        else:
            messages += [question, turn]
            question = None
    if question is not None:
        repairs.append("a question without an answer left out")
    return messages if len(messages) > 1 else []


def _fill_in(turns: list[dict], images: list, repairs: list[str]) -> str | None:
    """Puts the images of a record where its tags and its empty image blocks are; or says why that cannot be."""
    blocks = [block for turn in turns for block in turn["content"] if block["type"] == "image"]
    places = [block for block in blocks if image_source(block) is None]
    if blocks and not places:  # every image is where it belongs
        named = [_as_image(image) for image in images]
        return None if named == blocks else "images in the messages and others beside them"
    if not places:
        first = next((turn for turn in turns if turn["role"] == "user"), turns[0])
        places = [{"type": "image"} for _ in images]
        first["content"] = [*places, *first["content"]]
        repairs.append("images without an <image> tag put in front")
    elif len(images) == 1 < len(places):
        for turn in turns:
            turn["content"] = [block for block in turn["content"] if not any(block is place for place in places[1:])]
        places = places[:1]
        repairs.append("a repeated <image> tag left out")
    if len(places) != len(images):
        return "images and <image> tags of different number"
    for place, image in zip(places, images):
        place.update(_as_image(image))
    return None


def _as_plain(message: dict) -> dict:
    """Text alone as text."""
    if any(block["type"] == "image" for block in message["content"]):
        return message
    return {"role": message["role"], "content": "\n".join(block["text"] for block in message["content"])}
