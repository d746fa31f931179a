"""A conversation that waits for its answer, and the answer as it comes."""

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from modeling_visualchat.chat_session_visualchat import Usage
from processing_visualchat.evaluation.answering import SeededSampling

from .text import AnswerText


@dataclass(frozen=True)
class Request:
    """
    A conversation to answer.

    Args:
        owner (`str`): Whose it is.
        input_ids (`list[int]`): Its tokens, with the placeholders of images.
        pixel_values (`torch.Tensor` of shape `(images, channels, height, width)`, *optional*): Its images.
        max_new_tokens (`int`): Maximum tokens of the answer.
        temperature (`float`, *optional*, defaults to 0): 0 for the most likely tokens.
        top_p (`float`, *optional*, defaults to 1): The probability mass that is sampled from.
        seed (`int`, *optional*): Of a sampled answer, which then does not depend on its batch.
        stop (`tuple[str, ...]`): Strings before which the answer ends.
        seconds (`float`, *optional*): Maximum time until its last token.
    """

    owner: str
    input_ids: list[int]
    pixel_values: torch.Tensor | None
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    seconds: float = float("inf")

    @property
    def processors(self) -> LogitsProcessorList:
        """What makes a sample of the scores of its row; empty for a greedy answer."""
        if not self.temperature:
            return LogitsProcessorList()
        steps: list[LogitsProcessor] = [TemperatureLogitsWarper(self.temperature)]
        steps += [TopPLogitsWarper(self.top_p)] if self.top_p < 1 else []
        seed = secrets.randbits(64) if self.seed is None else self.seed
        return LogitsProcessorList([*steps, SeededSampling([str(seed)])])


@dataclass
class Reply:
    """The answer to a request: an asynchronous iterator of `(text, usage)`, and a row of a batch."""

    request: Request
    text: AnswerText
    end_tokens: frozenset[int]
    image_seq_length: int
    loop: asyncio.AbstractEventLoop
    started: float = field(default_factory=time.perf_counter)
    first_token_seconds: float = 0.0
    finish_reason: str | None = None  # once it is given to its reader
    new_images: int = 0
    _is_cancelled: bool = False
    _events: asyncio.Queue = field(default_factory=asyncio.Queue)

    @property
    def num_images(self) -> int:
        """The number of images of the conversation, each as often as it is shown."""
        return 0 if self.request.pixel_values is None else len(self.request.pixel_values)

    @property
    def _age(self) -> float:
        return time.perf_counter() - self.started

    def cancel(self) -> None:
        """Ends the answer after its next token: nobody reads it."""
        self._is_cancelled = True

    async def __aiter__(self) -> AsyncIterator[tuple[str, Usage | None]]:
        try:
            while True:
                async with asyncio.timeout(self.request.seconds - self._age):
                    event = await self._events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if event[1] is not None:
                    return
        except TimeoutError:
            message = f"The answer took more than {self.request.seconds:g} seconds."
            raise TimeoutError(message) from None
        finally:
            self.cancel()

    def is_due(self) -> bool:
        """Whether the row still needs tokens. One whose reader is gone, or whose time is over, does not."""
        if self.finish_reason is None and (self._is_cancelled or self._age > self.request.seconds):
            self.finish_reason = "stopped"
        return self.finish_reason is None

    def put(self, token: int) -> None:
        """Hands on the text of a token, and ends the answer if it is the last one."""
        if not self.is_due():
            return
        if not self.text.tokens:
            self.first_token_seconds = self._age
        if text := self.text.put(token):
            self._send((text, None))
        if self.text.is_stopped or token in self.end_tokens:
            self._finish("stop")
        elif len(self.text.tokens) >= self.request.max_new_tokens:
            self._finish("length")

    def fail(self, error: Exception) -> None:
        """Ends the answer with an error."""
        if self.finish_reason is None:
            self.finish_reason = "error"
            self._send(error)

    def _finish(self, reason: str) -> None:
        self.finish_reason = reason
        usage = Usage(
            text_tokens=len(self.request.input_ids) - self.num_images * self.image_seq_length,
            cached_text_tokens=0,
            new_images=self.new_images,
            known_images=self.num_images - self.new_images,
            answer_tokens=len(self.text.tokens),
            first_token_seconds=self.first_token_seconds,
            seconds=self._age,
            finish_reason=reason,
        )
        self._send((self.text.finish(), usage))

    def _send(self, event: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop of a reader that is gone
            self.loop.call_soon_threadsafe(self._events.put_nowait, event)
