"""
The message format of a conversation, and its validation.

    [{"role": "system", "content": "Answer in one word."},                        # optional, first
     {"role": "user", "content": [{"type": "image", "path": "cat.png"},           # path, url, base64 or image
                                  {"type": "text", "text": "What is it?"}]},
     {"role": "assistant", "content": "A cat."}, ...]                             # user and assistant take turns

An answer with `"weight": 0` or `"loss": False` is not learned.
"""

from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any


ROLES = ("system", "user", "assistant")
IMAGE_SOURCES = ("image", "path", "url", "base64")


def validate_conversation(
    messages: list[dict], control_tokens: Sequence[str] = ("<image>",), name: str = "The conversation"
) -> None:
    """
    Validates a conversation once, where it enters.

    Args:
        messages (`list[dict]`): The messages, as above; OpenAI's `image_url` blocks are images too.
        control_tokens (`Sequence[str]`, *optional*, defaults to `("<image>",)`): The placeholder of an image, and
            special tokens, which no text may hold.
        name (`str`, *optional*): The name of the conversation in errors.

    Raises:
        `ValueError`: says which message is wrong, what was found and what is allowed.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(f"{name} must be a list of messages that is not empty, got {messages!r:.80}.")
    for index, message in enumerate(messages):
        where = f"{name}, message {index}"
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise ValueError(f"{where} must have a role and a content, got {message!r:.80}.")
        if message["role"] not in ROLES:
            raise ValueError(f"{where} has the unknown role {message['role']!r}; use one of {', '.join(ROLES)}.")
        if message["role"] == "system" and index > 0:
            raise ValueError(f"{where} is a system message; it can only be the first.")
        _validate_content(message, control_tokens, where)
    turns = [message["role"] for message in messages if message["role"] != "system"]
    if "user" not in turns:
        raise ValueError(f"{name} has no user turn; it needs a question.")
    for turn, (role, expected) in enumerate(zip(turns, cycle(("user", "assistant"))), start=1):
        if role != expected:
            fix = "user and assistant take turns; join the two messages" if turn > 1 else "it must start with the user"
            raise ValueError(f"{name} has {role!r} at turn {turn} where {expected!r} is due: {fix}.")


def has_loss(message: dict) -> bool:
    """Whether a message is an answer to learn."""
    return message["role"] == "assistant" and 0 not in (message.get("weight"), message.get("loss"))


def is_image(block) -> bool:
    """Whether a block of a message is an image."""
    return isinstance(block, dict) and block.get("type") in ("image", "image_url")


def image_source(block: dict) -> Any:
    """The source of an image block, as [`load_image`] accepts it; `None` if it has none."""
    url = block.get("image_url")
    sources = [*(block.get(name) for name in IMAGE_SOURCES), url.get("url") if isinstance(url, dict) else url]
    return next((source for source in sources if source is not None), None)


def map_blocks(messages: list[dict], change: Callable[[Any], Any]) -> list[dict]:
    """Messages with other blocks; whatever is not a list of blocks stays as it is."""
    if not isinstance(messages, (list, tuple)):
        return messages
    return [
        {**message, "content": [change(block) for block in message["content"]]}
        if isinstance(message, dict) and isinstance(message.get("content"), (list, tuple))
        else message
        for message in messages
    ]


def drop_nulls(messages: list[dict]) -> list[dict]:
    """Messages without the null keys of their blocks, which `datasets` adds for a common schema."""

    def without_nulls(block):
        return {key: value for key, value in block.items() if value is not None} if isinstance(block, dict) else block

    return map_blocks(messages, without_nulls)


def text_to_blocks(messages: list[dict]) -> list[dict]:
    """Messages whose text is a block, the one form that every template with images reads."""
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message["content"], str)
        else message
        for message in messages
    ]


def _validate_content(message: dict, control_tokens: Sequence[str], where: str) -> None:
    role, content = message["role"], message["content"]
    if not isinstance(content, (str, list, tuple)) or not content:
        raise ValueError(f"{where} must have text or a list of blocks that is not empty, got {content!r:.80}.")
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    for block in blocks:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "text":
            if not isinstance(block.get("text"), str):
                raise ValueError(f"{where} has a text block without text: {block!r:.80}.")
            if token := next((token for token in control_tokens if token in block["text"]), None):
                raise ValueError(
                    f"{where} holds a literal {token} in its text, which is a special token. Leave it out, or give an "
                    'image as a block of its own, {"type": "image", "path": …}.'
                )
        elif kind in ("image", "image_url"):
            if role != "user":
                raise ValueError(f"{where} shows an image as {role}; only the user shows images.")
            if kind == "image_url" and not block.get("image_url"):
                raise ValueError(f"{where} has an image_url block without a URL: {block!r:.80}.")
            number = block.get("number")
            if number is not None and (not isinstance(number, int) or number < 1):
                raise ValueError(f"{where} has an image with the number {number!r}; expected one from 1 up, or none.")
            if sum(source in block for source in (*IMAGE_SOURCES, "image_url")) > 1:
                raise ValueError(
                    f"{where} has an image with more than one source; give one of {', '.join(IMAGE_SOURCES)}."
                )
        else:
            raise ValueError(f"{where} has a block of type {kind!r}; use text, image or image_url.")
