"""
The engine: one thread that owns the model, and answers the conversations that come in one batch.

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
from typing import Any

from modeling_visualchat.key_rotation_visualchat import rotary_limit

from .batch import EngineMemory, JoinedBatch, WholeBatch
from .replies import Reply, Request
from .text import AnswerText


class EngineFull(Exception):
    """As many conversations wait as are allowed to."""


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
        self.model, self.processor, self.memory, self.config = model, processor, memory, model.config
        self.tokenizer = copy.deepcopy(processor.tokenizer)  # the processor's is used by other threads
        # Where frequencies depend on the longest row, each row is a batch.
        self.max_batch = max_batch if rotary_limit(model.config.text_config) is None else 1
        self.seconds_to_gather = seconds_to_gather
        ids = model.generation_config.eos_token_id
        self.end_tokens = frozenset(ids if isinstance(ids, list) else [ids])
        self._waiting: queue.Queue[Reply | None] = queue.Queue(max_waiting)
        self._is_closing = self._has_ended = False
        can_join = model.model.supports_conversation_cache() and self.max_batch > 1
        self._batch = (JoinedBatch if can_join else WholeBatch)(model, self.tokenizer, memory)
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
        while not self._has_ended or self._batch.replies:
            new = [reply for reply in self._gather() if reply.is_due()]
            try:
                if new:
                    self._batch.join(new)
            except Exception as error:  # of these; the others may be well
                for reply in new:
                    reply.fail(error)
            try:
                if self._batch.replies:
                    self._batch.step()
            except Exception as error:
                for reply in self._batch.replies:
                    reply.fail(error)
                self._batch.clear()

    def _gather(self) -> list[Reply]:
        """The conversations that wait, as many as there is room for; without any row, the first is waited for."""
        replies: list[Reply] = []
        until = time.perf_counter() if self._batch.replies else float("inf")
        while len(replies) < self.max_batch - len(self._batch.replies) and not self._has_ended:
            try:
                timeout = max(0.0, until - time.perf_counter()) if replies or self._batch.replies else None
                reply = self._waiting.get(block=timeout != 0.0, timeout=timeout)
            except queue.Empty:
                break
            if reply is None:
                self._has_ended = True
                break
            until = min(until, time.perf_counter() + self.seconds_to_gather)
            replies.append(reply)
        return replies
