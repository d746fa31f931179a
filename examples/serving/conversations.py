"""From a request of the API to one of the engine: its images are opened, and its messages tokenized."""

import threading
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from .engine import Engine
from .errors import ApiError
from .image_store import ImageStore
from .images import decode_text, open_images
from .remote_images import download_image
from .replies import Request
from .schemas import ChatRequest, ImageSource, ResponseRequest, find_images, to_messages


@dataclass(frozen=True)
class Limits:
    """
    What a request may take.

    Args:
        max_images (`int`): Images of a conversation.
        max_pixels (`int`): Pixels of its images together.
        max_body (`int`): Bytes of a body, and of an image at a URL.
        max_new_tokens (`int`): Tokens of an answer; also what a request gets that names none.
        max_requests (`int`): Requests in progress.
        max_stored (`int`): Bytes of the stored images of a key.
        seconds (`float`): Time until the last token of an answer.
        image_hosts (`Collection[str]`): Hosts that images are fetched from.
    """

    max_images: int = 20
    max_pixels: int = 100_000_000
    max_body: int = 32 * 2**20
    max_new_tokens: int = 1024
    max_requests: int = 128
    max_stored: int = 256 * 2**20
    seconds: float = 300.0
    image_hosts: Collection[str] = ()


class Conversations:
    """
    Prepares conversations for an engine.

    Args:
        engine ([`Engine`]): The engine.
        processor (`VisualChatProcessor`): The processor of its model.
        store ([`ImageStore`]): Images that messages may name.
        limits ([`Limits`]): What a request may take.
    """

    def __init__(self, engine: Engine, processor: Any, store: ImageStore, limits: Limits):
        self.processor, self.store, self.limits = processor, store, limits
        longest = getattr(engine.config.text_config, "max_position_embeddings", None)
        self.max_tokens = min(processor.tokenizer.model_max_length, longest or processor.tokenizer.model_max_length)
        self._lock = threading.Lock()  # a tokenizer changes while it tokenizes

    def prepare(self, request: ChatRequest | ResponseRequest, owner: str) -> Request:
        """
        The request for the engine, of a client with a key.

        Raises:
            [`ApiError`]: a 400 for what cannot be answered, and a 404 for an image that is not of this owner.
        """
        limits = self.limits
        limit = limits.max_new_tokens if request.limit is None else request.limit
        if limit > limits.max_new_tokens:
            message = f"{limit:,} tokens are asked for, and an answer has at most {limits.max_new_tokens:,}."
            raise ApiError(400, message, code="too_many_tokens")
        sources = find_images(request.messages)
        if len(sources) > limits.max_images:
            message = f"The conversation shows {len(sources):,} images, and {limits.max_images:,} are allowed."
            raise ApiError(400, message, code="too_many_images")
        images = open_images(((self._read(each, owner), each.param) for each in sources), limits.max_pixels)
        inputs = self._tokenize(to_messages(request.messages, images))
        tokens = inputs["input_ids"][0]
        room = self.max_tokens - len(tokens)
        if room < 1:
            message = (
                f"The conversation has {len(tokens):,} tokens; the model reads {self.max_tokens:,} with its answer."
            )
            raise ApiError(400, message, code="context_length_exceeded")
        return Request(
            owner=owner,
            input_ids=tokens,
            pixel_values=inputs.get("pixel_values"),
            max_new_tokens=min(limit, room),
            temperature=request.temperature or 0.0,
            top_p=1.0 if request.top_p is None else request.top_p,
            seed=request.seed,
            stop=request.stops,
            seconds=limits.seconds,
        )

    def _read(self, image: ImageSource, owner: str) -> bytes:
        if image.kind == "id":
            return self.store.get(owner, image.source, image.param).data
        if image.source[:8].lower().startswith(("http://", "https://")):
            return download_image(image.source, self.limits.image_hosts, self.limits.max_body, image.param)
        return decode_text(image.source, image.param)

    def _tokenize(self, messages: list[dict]) -> Any:
        try:
            with self._lock:
                inputs = self.processor.apply_chat_template(
                    messages,
                    add_generation_prompt=True,
                    tokenize=True,
                    return_dict=True,
                    return_tensors="pt",
                    sanitize_control_tokens=True,
                )
        except ValueError as error:
            raise ApiError(400, str(error), "messages", "invalid_conversation") from error
        return {**inputs, "input_ids": inputs["input_ids"].tolist()}
