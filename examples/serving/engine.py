"""
The engine: one thread that owns the model, and answers the conversations that wait in batches.

    engine = Engine(model, processor, memory)
    reply = engine.submit(request)                       # from a coroutine
    async for text, usage in reply: ...                  # usage comes last, with the rest of the text
    engine.close()                                       # once everything is answered
"""

import asyncio
import copy
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from modeling_visualchat import ImageMemory
from modeling_visualchat.image_states_visualchat import same_images
from modeling_visualchat.key_rotation_visualchat import rotary_limit

from .replies import Reply, Request
from .text import AnswerText


GREEDY = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}


class EngineFull(Exception):
    """As many conversations wait as are allowed to."""


class EngineMemory(ImageMemory):
    """An image memory that tells which of the unique images of its last call were computed."""

    computed: list[int] | None = None

    def get_entries(self, keys, device, compute):
        """See [`TensorStore`]."""
        self.computed = []

        def note(missing: list[int]) -> list:
            self.computed = missing
            return compute(missing)

        return super().get_entries(keys, device, note)


class RowSampling(LogitsProcessor):
    """Changes the scores of each row by processors of its own."""

    def __init__(self, rows: Sequence[LogitsProcessorList]):
        self.rows = rows

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        pairs = zip(self.rows, input_ids.split(1), scores.split(1))
        return torch.cat([processors(ids, row) for processors, ids, row in pairs])


class RowDelivery(StoppingCriteria):
    """
    Hands the new token of each row to its reply, and ends the rows whose replies need no more. It takes the place of
    a streamer, which gets tokens only after it is decided which rows end.
    """

    def __init__(self, replies: Sequence[Reply]):
        self.replies = replies
        self.before_first: Callable[[], None] | None = None

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        if self.before_first is not None:
            self.before_first()
            self.before_first = None
        for reply, token in zip(self.replies, input_ids[:, -1].tolist()):
            try:
                reply.put(token)
            except Exception as error:  # of one row, and no reason to end the others
                reply.fail(error)
        return torch.tensor([not reply.is_due() for reply in self.replies], device=input_ids.device)


class Engine:
    """
    Answers conversations in batches, on a thread of its own.

    Args:
        model (`VisualChatForConditionalGeneration`): The model, frozen and in evaluation mode.
        processor (`VisualChatProcessor`): Its processor.
        memory ([`EngineMemory`], *optional*): Where the images of all conversations are looked up.
        max_batch (`int`, *optional*, defaults to 16): Maximum conversations of a batch.
        max_waiting (`int`, *optional*, defaults to 64): Maximum conversations that wait for one.
        seconds_to_gather (`float`, *optional*, defaults to 0.005): How long the first of a batch waits for others.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        memory: EngineMemory | None = None,
        max_batch: int = 16,
        max_waiting: int = 64,
        seconds_to_gather: float = 0.005,
    ):
        self.model, self.processor, self.memory = model, processor, memory
        self.tokenizer = copy.deepcopy(processor.tokenizer)  # the processor's is used by other threads
        # Where frequencies depend on the longest row, each row is a batch.
        self.max_batch = max_batch if rotary_limit(model.config.text_config) is None else 1
        self.seconds_to_gather = seconds_to_gather
        ids = model.generation_config.eos_token_id
        self.end_tokens = frozenset(ids if isinstance(ids, list) else [ids])
        self._waiting: queue.Queue[Reply | None] = queue.Queue(max_waiting)
        self._is_closing = self._has_ended = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """The number of conversations that wait for a batch."""
        return self._waiting.qsize()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def submit(self, request: Request) -> Reply:
        """
        The reply to a request, an asynchronous iterator of `(text, usage)`.

        Raises:
            [`EngineFull`]: too many conversations wait, or the engine is closed.
        """
        text = AnswerText(self.tokenizer, request.stop)
        loop = asyncio.get_running_loop()
        reply = Reply(request, text, self.end_tokens, self.model.config.image_seq_length, loop)
        try:
            if self._is_closing:
                raise EngineFull("The server is shutting down.")
            self._waiting.put_nowait(reply)
        except queue.Full:
            raise EngineFull(f"{self._waiting.maxsize} conversations wait already; try again later.") from None
        return reply

    def close(self) -> None:
        """Ends the thread once everything that was submitted is answered."""
        if not self._is_closing:
            self._is_closing = True
            self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        while not self._has_ended:
            replies = [reply for reply in self._gather() if reply.is_due()]
            try:
                if replies:
                    self._answer(replies)
            except Exception as error:  # of this batch; the next one may be well
                for reply in replies:
                    reply.fail(error)

    def _gather(self) -> list[Reply]:
        """The conversations that wait, up to a batch; the first is waited for."""
        replies: list[Reply] = []
        until = float("inf")
        while len(replies) < self.max_batch:
            try:
                reply = self._waiting.get(timeout=max(0.0, until - time.perf_counter()) if replies else None)
            except queue.Empty:
                break
            if reply is None:
                self._has_ended = True
                break
            until = min(until, time.perf_counter() + self.seconds_to_gather)
            replies.append(reply)
        return replies

    def _answer(self, replies: list[Reply]) -> None:
        """Answers a batch by one call of `generate`."""
        requests = [reply.request for reply in replies]
        inputs = self.tokenizer.pad(
            {"input_ids": [request.input_ids for request in requests]}, padding_side="left", return_tensors="pt"
        )
        images = [request.pixel_values for request in requests if request.pixel_values is not None]
        delivery = RowDelivery(replies)
        if images:
            inputs["pixel_values"] = torch.cat(images)
            delivery.before_first = lambda: count_new_images(replies, inputs["pixel_values"], self.memory)
        if self.memory is not None:
            self.memory.computed = None
        self.model.generate(
            **inputs.to(self.model.device),
            **GREEDY,
            max_new_tokens=max(request.max_new_tokens for request in requests),
            image_memory=self.memory,
            logits_processor=LogitsProcessorList([RowSampling([request.processors for request in requests])]),
            stopping_criteria=StoppingCriteriaList([delivery]),
        )


def count_new_images(replies: Sequence[Reply], pixel_values: torch.Tensor, memory: EngineMemory | None) -> None:
    """Notes how many images were computed for each reply; one of several replies, for the first of them."""
    index = same_images(pixel_values)
    computed = range(len(index)) if memory is None or memory.computed is None else memory.computed
    place = 0
    for reply in replies:
        for number in index[place : place + reply.num_images]:
            reply.new_images += number in computed and index.index(number) == place
            place += 1
