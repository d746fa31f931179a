"""The routes of the server."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from .answers import ChatAnswer, ResponseAnswer
from .conversations import Conversations, Limits
from .engine import Engine, EngineFull
from .errors import ApiError, busy
from .image_store import ImageStore, StoredImage
from .images import decode_text, open_images, read_size
from .metrics import Metrics
from .replies import Reply
from .schemas import ChatRequest, ImageUpload, ResponseRequest, parse


logger = logging.getLogger("uvicorn.error")


class ReplyResponse(StreamingResponse):
    """A stream of events, whose reply ends with it."""

    def __init__(self, events: AsyncIterator[str], reply: Reply):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.reply = reply

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.reply.cancel()


class Routes:
    """
    The routes, and what they share.

    Args:
        engine ([`Engine`]): The engine.
        processor (`VisualChatProcessor`): The processor of its model.
        name (`str`): The name of the model.
        limits ([`Limits`]): What a request may take.
    """

    def __init__(self, engine: Engine, processor: Any, name: str, limits: Limits):
        self.engine, self.name, self.limits = engine, name, limits
        self.image_seq_length = processor.image_seq_length
        self.store = ImageStore(limits.max_stored)
        self.conversations = Conversations(engine, processor, self.store, limits)
        self.metrics = Metrics(lambda: engine.num_waiting)
        self.model = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "visualchat"}

    def table(self) -> list[tuple[str, str, Callable]]:
        """Method, path and function of each route."""
        return [
            ("POST", "/v1/chat/completions", self.complete_chat),
            ("POST", "/v1/responses", self.respond),
            ("GET", "/v1/models", self.list_models),
            ("GET", "/v1/models/{id:path}", self.show_model),
            ("POST", "/v1/images", self.store_image),
            ("GET", "/v1/images/{id}", self.show_image),
            ("DELETE", "/v1/images/{id}", self.remove_image),
            ("GET", "/health", self.tell_health),
            ("GET", "/metrics", self.show_metrics),
        ]

    async def complete_chat(self, request: Request) -> Any:
        """An answer to a conversation."""
        body = parse(ChatRequest, await request.body())
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        return await self._answer(request, body, ChatAnswer(self.name, self.image_seq_length, include_usage))

    async def respond(self, request: Request) -> Any:
        """The same in the form of the Responses API."""
        body = parse(ResponseRequest, await request.body())
        return await self._answer(request, body, ResponseAnswer(self.name, self.image_seq_length))

    async def list_models(self) -> dict:
        """The one model."""
        return {"object": "list", "data": [self.model]}

    async def show_model(self, id: str) -> dict:
        """The model."""
        self._check_model(id)
        return self.model

    async def store_image(self, request: Request) -> dict:
        """Stores an image, the body itself or base64 text in it, and gives it an id."""
        body = await request.body()
        if not request.headers.get("content-type", "").startswith("image/"):
            body = decode_text(parse(ImageUpload, body).image, "image")
        await asyncio.to_thread(open_images, [(body, "image")], self.limits.max_pixels)
        image = StoredImage(body, *read_size(body))
        self.store.add(request.state.owner, image)
        return image.description

    async def show_image(self, request: Request, id: str) -> dict:
        """What is known of a stored image."""
        return self.store.get(request.state.owner, id).description

    async def remove_image(self, request: Request, id: str) -> dict:
        """Removes a stored image."""
        self.store.remove(request.state.owner, id)
        return {"id": id, "object": "image", "deleted": True}

    async def tell_health(self) -> dict:
        """That the server can answer."""
        if not await asyncio.to_thread(lambda: self.engine.is_alive):
            raise ApiError(503, "The engine has ended; start the server again.", code="engine_ended")
        return {"status": "ok", "waiting": self.engine.num_waiting}

    async def show_metrics(self) -> Response:
        """Metrics for Prometheus."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    def _check_model(self, name: str) -> None:
        if name != self.name:
            message = f"There is no model {name[:100]!r}; this server has {self.name!r}."
            raise ApiError(404, message, "model", "model_not_found")

    async def _answer(self, request: Request, body: ChatRequest | ResponseRequest, answer: Any) -> Any:
        """An answer as an object or a stream."""
        self._check_model(body.model)
        prepared = await asyncio.to_thread(self.conversations.prepare, body, request.state.owner)
        try:
            reply = self.engine.submit(prepared)
        except EngineFull as error:
            raise busy(str(error)) from None
        if body.stream:
            return ReplyResponse(self._stream(reply, answer), reply)
        text = ""
        try:
            async for part in reply:
                new, usage = part
                text += new
        except Exception as error:
            raise to_api_error(error) from error
        finally:
            reply.cancel()
        assert usage is not None  # the last part has it
        self.metrics.count_usage(usage, self.image_seq_length)
        return answer.whole(text, usage)

    async def _stream(self, reply: Reply, answer: Any) -> AsyncIterator[str]:
        text = ""
        try:
            for event in answer.start():
                yield event
            async for part in reply:
                new, usage = part
                text += new
                for event in answer.delta(new) if new else ():
                    yield event
            assert usage is not None  # the last part has it
            self.metrics.count_usage(usage, self.image_seq_length)
            for event in answer.end(text, usage):
                yield event
        except Exception as error:
            for event in answer.error(to_api_error(error).content):
                yield event


def to_api_error(error: Exception) -> ApiError:
    """The error of an answer that the engine could not give."""
    if isinstance(error, TimeoutError):
        return ApiError(504, f"{error} Ask for fewer tokens, or try again later.", code="timeout")
    logger.error("An answer failed", exc_info=error)
    return ApiError(500, "The server failed to answer; its log says why.", code="engine_error")
