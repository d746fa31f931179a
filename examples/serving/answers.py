"""
Answers in the forms of OpenAI's API: as objects, and as server-sent events.

A form is made for a request, gets the text as it comes, and says what is sent for it.
"""

import json
import secrets
import time
from collections.abc import Iterator
from typing import Any

from modeling_visualchat.chat_session_visualchat import Usage


FINISH_REASONS = {"stop": "stop", "length": "length", "stopped": "stop"}


def event(data: dict, name: str | None = None) -> str:
    """A server-sent event."""
    return (f"event: {name}\n" if name else "") + f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def count(usage: Usage, image_seq_length: int) -> dict[str, int]:
    """Tokens of a prompt and its answer, and those that were known: of images that the client has shown before."""
    known = usage.cached_text_tokens + usage.known_images * image_seq_length
    prompt = usage.text_tokens + usage.new_images * image_seq_length + known
    return {"prompt": prompt, "cached": known, "answer": usage.answer_tokens, "total": prompt + usage.answer_tokens}


class ChatAnswer:
    """An answer of /v1/chat/completions."""

    def __init__(self, model: str, image_seq_length: int, include_usage: bool = False):
        self.model, self.image_seq_length, self.include_usage = model, image_seq_length, include_usage
        self.id, self.created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())

    def whole(self, text: str, usage: Usage) -> dict:
        """The response."""
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": self._reason(usage)}
        return self._object("chat.completion", [choice]) | {"usage": self._usage(usage)}

    def start(self) -> Iterator[str]:
        """What is sent before the first text."""
        yield self._chunk({"role": "assistant", "content": ""})

    def delta(self, text: str) -> Iterator[str]:
        """What is sent for text."""
        yield self._chunk({"content": text})

    def end(self, text: str, usage: Usage) -> Iterator[str]:
        """What is sent after the last text."""
        yield self._chunk({}, self._reason(usage))
        if self.include_usage:
            yield event(self._object("chat.completion.chunk", []) | {"usage": self._usage(usage)})
        yield "data: [DONE]\n\n"

    def error(self, content: dict) -> Iterator[str]:
        """What is sent for an error after the start."""
        yield event(content)

    def _reason(self, usage: Usage) -> str:
        return FINISH_REASONS[usage.finish_reason]

    def _object(self, name: str, choices: list) -> dict:
        return {"id": self.id, "object": name, "created": self.created, "model": self.model, "choices": choices}

    def _chunk(self, delta: dict, reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return event(self._object("chat.completion.chunk", [choice]))

    def _usage(self, usage: Usage) -> dict:
        tokens = count(usage, self.image_seq_length)
        return {
            "prompt_tokens": tokens["prompt"],
            "completion_tokens": tokens["answer"],
            "total_tokens": tokens["total"],
            "prompt_tokens_details": {"cached_tokens": tokens["cached"]},
            "images": {"new": usage.new_images, "known": usage.known_images},
        }


class ResponseAnswer:
    """An answer of /v1/responses."""

    def __init__(self, model: str, image_seq_length: int):
        self.model, self.image_seq_length = model, image_seq_length
        self.id, self.item_id = f"resp_{secrets.token_hex(12)}", f"msg_{secrets.token_hex(12)}"
        self.created, self._number = int(time.time()), -1
        self._place = {"item_id": self.item_id, "output_index": 0, "content_index": 0}

    def whole(self, text: str, usage: Usage) -> dict:
        """The response."""
        is_whole = usage.finish_reason != "length"
        tokens = count(usage, self.image_seq_length)
        response = self._object("completed" if is_whole else "incomplete", [self._item(text, is_whole)])
        response["incomplete_details"] = None if is_whole else {"reason": "max_output_tokens"}
        response["usage"] = {
            "input_tokens": tokens["prompt"],
            "input_tokens_details": {"cached_tokens": tokens["cached"]},
            "output_tokens": tokens["answer"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": tokens["total"],
            "images": {"new": usage.new_images, "known": usage.known_images},
        }
        return response

    def start(self) -> Iterator[str]:
        """What is sent before the first text."""
        item = {**self._item("", False), "status": "in_progress", "content": []}
        yield self._event("response.created", response=self._object("in_progress", []))
        yield self._event("response.in_progress", response=self._object("in_progress", []))
        yield self._event("response.output_item.added", output_index=0, item=item)
        yield self._event("response.content_part.added", **self._place, part=self._part(""))

    def delta(self, text: str) -> Iterator[str]:
        """What is sent for text."""
        yield self._event("response.output_text.delta", **self._place, delta=text, logprobs=[])

    def end(self, text: str, usage: Usage) -> Iterator[str]:
        """What is sent after the last text."""
        response = self.whole(text, usage)
        yield self._event("response.output_text.done", **self._place, text=text, logprobs=[])
        yield self._event("response.content_part.done", **self._place, part=self._part(text))
        yield self._event("response.output_item.done", output_index=0, item=response["output"][0])
        yield self._event(f"response.{response['status']}", response=response)

    def error(self, content: dict) -> Iterator[str]:
        """What is sent for an error after the start."""
        error = content["error"]
        yield self._event("error", code=error["code"], message=error["message"], param=error["param"])

    def _part(self, text: str) -> dict:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _item(self, text: str, is_whole: bool) -> dict:
        status = "completed" if is_whole else "incomplete"
        content = [self._part(text)]
        return {"type": "message", "id": self.item_id, "status": status, "role": "assistant", "content": content}

    def _object(self, status: str, output: list) -> dict:
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "model": self.model,
            "output": output,
            "error": None,
            "parallel_tool_calls": False,
            "tool_choice": "none",
            "tools": [],
        }

    def _event(self, name: str, **fields: Any) -> str:
        self._number += 1
        return event({"type": name, "sequence_number": self._number, **fields}, name)
