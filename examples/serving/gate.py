"""
What comes before a route: whose request it is, how many there are, and how large they are.

A body is read whole before a route sees it, and a request whose client goes away is cancelled, wherever it is.
"""

import asyncio
import contextlib
import hashlib
import ipaddress
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import urlsplit

from .errors import ApiError, busy


OPEN_PATHS = ("/health", "/metrics")
GRACE = 30.0  # seconds, for a client that is slow to read
OPEN_OWNER = "open"  # of everything, where there are no keys


def digest_of_key(key: str) -> str:
    """Whose something is: the digest of an API key, so that a comparison takes no time that tells of it."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def is_loopback(host: str) -> bool:
    """Whether only programs on this machine reach an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_local(headers: dict[bytes, str]) -> None:
    """
    A 403 for what a web page of another site may send from a browser on this machine: to a name of its own that it
    has pointed here (DNS rebinding, seen by `Host`), or to this server without asking first (seen by `Origin`).
    """
    for name, prefix, default in (("Host", "//", ""), ("Origin", "", "//localhost")):
        value = headers.get(name.lower().encode(), default)
        try:
            host = urlsplit(prefix + value).hostname
        except ValueError:
            host = None
        if not is_loopback(host or ""):
            message = (
                f"{name} {value[:100]!r} is not this machine. Without API keys, only programs on it are answered, at "
                "http://localhost or a loopback address; for others, start the server with API keys."
            )
            raise ApiError(403, message, code="not_local")


class Gate:
    """
    An ASGI application in front of another.

    Args:
        app: The other one.
        keys (`Iterable[str]`): API keys; without any, the server is open to programs on this machine.
        max_requests (`int`): Maximum requests at a time.
        max_body (`int`): Maximum bytes of a body.
        seconds (`float`): Maximum time until a body is there. A response has `GRACE` seconds more.
        observe (`Callable`): Gets the scope and the status of each request.
    """

    def __init__(
        self,
        app: Any,
        keys: Iterable[str],
        max_requests: int,
        max_body: int,
        seconds: float,
        observe: Callable[[dict, int], None],
    ):
        self.app, self.owners = app, {digest_of_key(key) for key in keys}
        self.max_requests, self.max_body, self.seconds = max_requests, max_body, seconds
        self.observe, self.num_requests = observe, 0

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def observed_send(message: dict) -> None:
            if message["type"] == "http.response.start":
                self.observe(scope, message["status"])
            await send(message)

        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        is_open = scope["path"] in OPEN_PATHS
        self.num_requests += not is_open
        try:
            if not self.owners:
                check_local(headers)
            if not is_open:
                scope.setdefault("state", {})["owner"] = self._owner(headers)
                if self.num_requests > self.max_requests:
                    raise busy(f"{self.max_requests} requests are in progress already; try again later.")
            body = await self._read(scope, receive)
            if body is not None:
                await self._run(scope, body, receive, observed_send)
        except ApiError as error:
            await error.response()(scope, receive, observed_send)
        finally:
            self.num_requests -= not is_open

    def _owner(self, headers: dict[bytes, str]) -> str:
        if not self.owners:
            return OPEN_OWNER
        scheme, _, key = headers.get(b"authorization", "").partition(" ")
        owner = digest_of_key(key.strip())
        if scheme.lower() != "bearer" or owner not in self.owners:
            message = "No valid API key was given; send one as `Authorization: Bearer KEY`."
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return owner

    async def _read(self, scope: dict, receive: Callable) -> bytes | None:
        """The body; `None` if it is cut off."""
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        too_large = ApiError(
            413, f"The body is larger than the {self.max_body:,} bytes that are allowed.", code="body_too_large"
        )
        if length.isdigit() and int(length[:20]) > self.max_body:
            raise too_large
        parts, size, is_whole = [], 0, False
        try:
            async with asyncio.timeout(self.seconds):
                while not is_whole:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size, is_whole = size + len(parts[-1]), not message.get("more_body", False)
                    if size > self.max_body:
                        raise too_large
        except TimeoutError:
            message = f"The body was not there after {self.seconds:g} seconds."
            raise ApiError(408, message, code="body_timeout") from None
        return b"".join(parts)

    async def _run(self, scope: dict, body: bytes, receive: Callable, send: Callable) -> None:
        """Runs the application until it is done, or its client is gone or takes nothing."""
        bodies = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive_body() -> dict:
            for message in bodies:
                return message
            await asyncio.Event().wait()  # that the client goes away is noted here
            raise AssertionError

        running = asyncio.ensure_future(self.app(scope, receive_body, send))
        watching = asyncio.ensure_future(wait_for_disconnect(receive))
        try:
            either = {running, watching}
            await asyncio.wait(either, timeout=self.seconds + GRACE, return_when=asyncio.FIRST_COMPLETED)
        finally:
            watching.cancel()
            running.cancel()  # of no effect once it is done
            with contextlib.suppress(asyncio.CancelledError):
                await running


async def wait_for_disconnect(receive: Callable) -> None:
    """Returns when the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
