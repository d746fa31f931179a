"""Errors as OpenAI's API gives them."""

from fastapi.responses import JSONResponse


TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 504: "server_error"}


class ApiError(Exception):
    """
    An error that a client gets.

    Args:
        status (`int`): The HTTP status.
        message (`str`): What was found, what is wanted, and what to do.
        param (`str`, *optional*): The field that is wrong.
        code (`str`, *optional*): A name of the error for programs.
        headers (`dict[str, str]`, *optional*): Headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    @property
    def content(self) -> dict:
        """The body of the response."""
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The response."""
        return JSONResponse(self.content, self.status, self.headers)


def busy(message: str) -> ApiError:
    """The error of a server that has as much to do as it may."""
    return ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": "1"})
