"""
The requests of OpenAI's API that are understood, and what they say in the message format of the processor.

A field or a role that is not listed here is refused by its name.
"""

from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from processing_visualchat.evaluation.answering import NOTHING

from .errors import ApiError


# The fields of a block of content by its type; one of them is given.
BLOCKS = {
    "text": ("text",),
    "image_url": ("image_url",),
    "image_id": ("image_id",),
    "input_text": ("text",),
    "output_text": ("text",),
    "input_image": ("image_url", "file_id"),
}


class Strict(BaseModel):
    """A model without other fields, or conversions between types."""

    model_config = ConfigDict(extra="forbid", strict=True)


class ImageUrl(Strict):
    """A data URI, base64 text or a URL."""

    url: str
    detail: str | None = None  # of no effect: each image has the same number of tokens


class Block(Strict):
    """A part of a message."""

    type: Literal["text", "image_url", "image_id", "input_text", "output_text", "input_image"]
    text: str | None = None
    image_url: ImageUrl | str | None = None
    image_id: str | None = None  # a handle of /v1/images
    file_id: str | None = None  # the same, by the name that it has in /v1/responses
    detail: str | None = None
    annotations: list | None = None
    logprobs: list | None = None

    @model_validator(mode="after")
    def check_fields(self) -> "Block":
        """Raises an error unless the block has a field of its type, and no other."""
        given = [name for name in ("text", "image_url", "image_id", "file_id") if getattr(self, name) is not None]
        if len(given) != 1 or given[0] not in BLOCKS[self.type]:
            raise ValueError(f"a block of type {self.type} has the field {' or '.join(BLOCKS[self.type])}")
        return self

    @property
    def image(self) -> tuple[str, str] | None:
        """The kind and the source of an image: an `"id"` or a `"url"`."""
        if (id := self.image_id or self.file_id) is not None:
            return "id", id
        url = self.image_url.url if isinstance(self.image_url, ImageUrl) else self.image_url
        return None if url is None else ("url", url)


class Message(Strict):
    """A message."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Block]
    type: Literal["message"] = "message"
    id: str | None = None
    status: str | None = None
    name: str | None = None
    refusal: None = None


class StreamOptions(Strict):
    """What a stream holds."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Sampling(Strict):
    """What both kinds of requests say about an answer."""

    model: str
    stream: bool = False
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None  # nothing is stored


Positive = Annotated[int, Field(ge=1)]
Stop = Annotated[str, Field(min_length=1, max_length=200)]


class ChatRequest(Sampling):
    """The body of /v1/chat/completions."""

    messages: list[Message]
    stream_options: StreamOptions | None = None
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    seed: int | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    n: Literal[1] | None = None

    @property
    def limit(self) -> int | None:
        """Maximum tokens of the answer."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings before which the answer ends."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ResponseRequest(Sampling):
    """The body of /v1/responses."""

    input: str | list[Message]
    instructions: str | None = None
    max_output_tokens: Positive | None = None

    @property
    def messages(self) -> list[Message]:
        """The conversation."""
        head = [] if self.instructions is None else [Message(role="system", content=self.instructions)]
        rest = [Message(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        return [*head, *rest]

    @property
    def limit(self) -> int | None:
        """Maximum tokens of the answer."""
        return self.max_output_tokens

    @property
    def seed(self) -> None:
        """Not a field of these requests."""

    @property
    def stops(self) -> tuple[str, ...]:
        """Not a field of these requests."""
        return ()


class ImageUpload(Strict):
    """The body of /v1/images, unless it is the image itself."""

    image: str  # a data URI or base64 text


Body = TypeVar("Body", bound=BaseModel)


def parse(schema: type[Body], body: bytes) -> Body:
    """
    The body of a request.

    Raises:
        [`ApiError`]: a 400 that names the field.
    """
    try:
        return schema.model_validate_json(body)
    except ValidationError as error:
        # Of the forms that a field may have, the one that fits furthest.
        problem = max(error.errors(include_url=False, include_context=False), key=lambda each: len(each["loc"]))
    is_name = (step for step in problem["loc"] if isinstance(step, int) or step in NAMES)
    field = ".".join(map(str, is_name)) or None
    if problem["type"] == "extra_forbidden":
        name = str(problem["loc"][-1])[:60]
        field = name if field is None else f"{field}.{name}"
        raise ApiError(400, f"Unknown or unsupported field: {field}. Leave it out.", field, "unknown_field")
    if problem["type"] == "json_invalid":
        raise ApiError(400, f"The body is not valid JSON: {problem['msg'][:200]}.", code="invalid_json")
    found = "" if problem["type"] == "missing" else f"; got {problem['input']!r:.80}"
    raise ApiError(400, f"{field or 'The body'}: {problem['msg']}{found}.", field, "invalid_value")


MODELS = (ChatRequest, ResponseRequest, Message, Block, ImageUrl, StreamOptions, ImageUpload)
NAMES = {name for model in MODELS for name in model.model_fields}


class ImageSource(NamedTuple):
    """An image of a request that is not open yet."""

    kind: str  # "id" or "url"
    source: str
    param: str  # its field


def find_images(messages: list[Message]) -> list[ImageSource]:
    """The images of a conversation, in their order; a 400 for one that no user shows."""
    found = []
    for index, message in enumerate(messages):
        for place, block in enumerate(message.content if isinstance(message.content, list) else ()):
            if block.image is not None:
                param = f"messages.{index}.content.{place}"
                if message.role != "user":
                    raise ApiError(400, f"Only the user shows images, not the {message.role}.", param, "invalid_value")
                found.append(ImageSource(*block.image, param))
    return found


def to_messages(messages: list[Message], images: list[Any]) -> list[dict]:
    """Messages as the processor takes them, with open images in the place of their sources."""
    following = iter(images)

    def convert(block: Block) -> dict:
        if block.image is not None:
            return {"type": "image", "image": next(following)}
        return {"type": "text", "text": block.text}

    converted = []
    for message in messages:
        role = "system" if message.role == "developer" else message.role
        content: Any = message.content
        if isinstance(content, list):
            content = [convert(block) for block in content]
            if role != "user":
                content = "\n".join(block["text"] for block in content)
        if role == "assistant" and not content:
            content = NOTHING  # what an empty answer is in the history
        converted.append({"role": role, "content": content})
    return converted
