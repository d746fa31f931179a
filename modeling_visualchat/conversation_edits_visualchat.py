"""
Edits of a conversation: messages in, changed messages out.

    messages = apply_edit(messages, {"replace_image": 2, "image": {"type": "image", "path": "bird.png"}})

| edit | |
|---|---|
| `{"replace_image": N, "image": BLOCK}` | another image in the place of image N |
| `{"remove_image": N}` | without image N |
| `{"swap_images": [N, M]}` | image N in the place of image M, and M in that of N |
| `{"edit_question": N, "question": TEXT}` | other words in question N |
| `{"edit_answer": N, "answer": TEXT}` | other words in the answer to question N |
| `{"remove_round": N}` | without question N, its images and its answer |
| `{"move_round": [N, M]}` | question N, with its images and its answer, becomes question M |
| `{"system": TEXT}` | another instruction at the beginning; an empty one is that of the chat template |

Questions are counted from 1. An image has the number of its block, `"number"`, by which the chat template names it, or
else the one after the image before it: in a [`ChatSession`], where every image gets one, "image 2" stays image 2
whatever is removed before it.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any


Messages = list[dict[str, Any]]


class EditError(ValueError):
    """An edit that does not fit the conversation."""


def apply_edit(messages: Messages, edit: dict[str, Any]) -> Messages:
    """
    The messages after an edit; those that were passed stay as they are.

    Raises:
        `EditError`: an edit that is not in the table above, or does not fit the conversation.
    """
    messages = [{**message, "content": copy.copy(message["content"])} for message in messages]
    name = next((name for name in EDITS if name in edit), None)
    if name is None:
        raise EditError(f"the edit has the keys {', '.join(edit)}; expected one of {', '.join(EDITS)}")
    if name in VALUES and VALUES[name] not in edit:
        raise EditError(f"{name} requires the key {VALUES[name]}")
    EDITS[name](messages, edit[name], edit)
    return messages


def iterate_images(messages: Messages) -> Iterator[tuple[int, list, int]]:
    """The number of each image, the content that holds it, and its place there."""
    number = 0
    for message in messages:
        content = message["content"]
        for place, block in enumerate(content if isinstance(content, list) else ()):
            if block.get("type") in ("image", "image_url"):
                number = block.get("number") or number + 1
                yield number, content, place


def number_images(messages: Messages) -> Messages:
    """The messages with the number of each image in its block."""
    messages = [{**message, "content": copy.copy(message["content"])} for message in messages]
    for number, content, place in [*iterate_images(messages)]:
        content[place] = {**content[place], "number": number}
    return messages


def round_starts(messages: Messages) -> list[int]:
    """The place of each question; a question and its answer are two messages."""
    return [place for place, message in enumerate(messages) if message["role"] == "user"]


def _find_image(messages: Messages, number: Any) -> tuple[list, int]:
    found = {known: (content, place) for known, content, place in iterate_images(messages)}
    if not isinstance(number, int) or number not in found:
        known = ", ".join(map(str, sorted(found))) or "none"
        raise EditError(f"there is no image {number!r}; the images of the conversation: {known}")
    return found[number]


def _find_round(messages: Messages, number: Any) -> int:
    starts = round_starts(messages)
    if not isinstance(number, int) or not 1 <= number <= len(starts):
        raise EditError(f"there is no question {number!r}; the conversation has {len(starts)}")
    return starts[number - 1]


def _replace_image(messages: Messages, number: Any, edit: dict) -> None:
    content, place = _find_image(messages, number)
    kept = {"number": content[place]["number"]} if "number" in content[place] else {}
    content[place] = {**edit["image"], **kept}


def _remove_image(messages: Messages, number: Any, edit: dict) -> None:
    content, place = _find_image(messages, number)
    if len(content) == 1:
        raise EditError(f"image {number} is the whole content of its message; nothing would be left of it")
    del content[place]


def _swap_images(messages: Messages, numbers: Any, edit: dict) -> None:
    (first, place), (second, other) = (_find_image(messages, number) for number in _pair(numbers))
    first[place], second[other] = second[other], first[place]


def _edit_question(messages: Messages, number: Any, edit: dict) -> None:
    message = messages[_find_round(messages, number)]
    content = message["content"] if isinstance(message["content"], list) else [{"type": "text"}]
    texts = [place for place, block in enumerate(content) if block["type"] == "text"]
    images = [block for block in content if block["type"] != "text"]
    place = texts[0] if len(texts) == 1 else len(images)
    text = {"type": "text", "text": _text(edit["question"], "question")}
    message["content"] = [*images[:place], text, *images[place:]]


def _edit_answer(messages: Messages, number: Any, edit: dict) -> None:
    start = _find_round(messages, number)
    if start + 1 == len(messages):
        raise EditError(f"question {number} has no answer yet")
    messages[start + 1] = {**messages[start + 1], "content": _text(edit["answer"], "answer")}


def _remove_round(messages: Messages, number: Any, edit: dict) -> None:
    start = _find_round(messages, number)
    if len(round_starts(messages)) == 1:
        raise EditError("it is the only question")
    del messages[start : start + 2]


def _move_round(messages: Messages, numbers: Any, edit: dict) -> None:
    source, target = (_find_round(messages, number) for number in _pair(numbers))
    moved = messages[source : source + 2]
    del messages[source : source + 2]
    messages[target:target] = moved


def _set_system(messages: Messages, text: Any, edit: dict) -> None:
    if not isinstance(text, str):
        raise EditError(f"the instruction {text!r} is not a text")
    rest = [message for message in messages if message["role"] != "system"]
    messages[:] = [{"role": "system", "content": text}, *rest] if text else rest


def _pair(numbers: Any) -> list:
    if not isinstance(numbers, (list, tuple)) or len(numbers) != 2:
        raise EditError(f"{numbers!r} is not a list of two numbers")
    return [*numbers]


def _text(text: Any, name: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise EditError(f"the {name} {text!r} is not a text")
    return text


# Each changes messages in place, by the value under its name and the whole edit.
EDITS: dict[str, Callable[[Messages, Any, dict], None]] = {
    "replace_image": _replace_image,
    "remove_image": _remove_image,
    "swap_images": _swap_images,
    "edit_question": _edit_question,
    "edit_answer": _edit_answer,
    "remove_round": _remove_round,
    "move_round": _move_round,
    "system": _set_system,
}
VALUES = {"replace_image": "image", "edit_question": "question", "edit_answer": "answer"}  # the other key of an edit
