"""The server as an ASGI application: its routes, its errors, and what comes before both."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from .conversations import Limits
from .engine import Engine
from .errors import ApiError
from .gate import Gate
from .routes import Routes


def make_app(engine: Engine, processor: Any, name: str, limits: Limits, keys: Iterable[str] = ()) -> FastAPI:
    """
    The server as an ASGI application. It closes the engine when it ends.

    Args:
        engine ([`Engine`]): The engine.
        processor (`VisualChatProcessor`): The processor of its model.
        name (`str`): The name of the model.
        limits ([`Limits`]): What a request may take.
        keys (`Iterable[str]`): API keys; without any, the server is open to programs on this machine.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    routes = Routes(engine, processor, name, limits)
    for method, path, route in routes.table():
        app.add_api_route(path, route, methods=[method], response_model=None)
    app.add_exception_handler(ApiError, give_error)
    app.add_exception_handler(HTTPException, give_http_error)
    app.add_exception_handler(Exception, give_fault)
    app.add_middleware(
        Gate,
        keys=keys,
        max_requests=limits.max_requests,
        max_body=limits.max_body,
        seconds=limits.seconds,
        observe=routes.metrics.count_request,
    )
    return app


async def give_error(request: Request, error: Any) -> Response:
    """An error that a route has raised."""
    return error.response()


async def give_http_error(request: Request, error: Any) -> Response:
    """An error of the router: a path or a method that is not there."""
    return ApiError(error.status_code, f"{request.method} {request.url.path[:100]}: {error.detail}.").response()


async def give_fault(request: Request, error: Exception) -> Response:
    """A fault of the server, which the log describes."""
    return ApiError(500, "The server failed to answer; its log says why.").response()
