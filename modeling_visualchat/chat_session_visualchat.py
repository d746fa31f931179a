"""
A conversation with a model in which any message or image may change: only what follows a change is computed again.

    session = model.start_chat(processor, image_memory=ImageMemory())
    session.ask("What is it?", images=["cat.png"])
    session.ask("And the difference to this one?", images=["dog.png"])
    session.replace_image(1, "lion.png")                 # answers the last question again
    session.edit(remove_round=1)                         # see `conversation_edits_visualchat.py` for all edits
    session.undo()
    session.save("chat.jsonl")                           # with its images
"""

import base64
import io
import json
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from .cache_visualchat import ConversationCache
from .conversation_edits_visualchat import EditError, Messages, apply_edit, iterate_images, number_images, round_starts
from .image_memory_visualchat import ImageMemory
from .key_rotation_visualchat import rotary_limit
from .weights_key_visualchat import frozen, image_key, known_key


OVERFLOW = ("error", "drop_first_rounds")
ROOM = 0.75  # of the budget, what is kept of a conversation that exceeds it, so that not every round drops one


@dataclass(frozen=True)
class Usage:
    """What an answer took to compute."""

    text_tokens: int  # of the conversation before the answer, that were computed
    cached_text_tokens: int  # and that were known
    new_images: int  # images that were computed
    known_images: int  # and that were known: in the cache, in the image memory, or shown twice
    answer_tokens: int
    first_token_seconds: float
    seconds: float
    finish_reason: str  # "stop" (the model ended it), "length", or "stopped" by `stop()`
    dropped_rounds: int = 0  # rounds at the beginning that exceed the budget, and that the answer has not read

    def __str__(self) -> str:
        dropped = f"; without the first {_counted(self.dropped_rounds, 'round')}" if self.dropped_rounds else ""
        return (
            f"computed: {_counted(self.text_tokens, 'text token')}, {_counted(self.new_images, 'image')}; known: "
            f"{_counted(self.cached_text_tokens, 'text token')}, {_counted(self.known_images, 'image')}{dropped}"
        )

    @property
    def speed(self) -> str:
        """How fast the answer came."""
        decoding = self.seconds - self.first_token_seconds
        rate = f", then {(self.answer_tokens - 1) / decoding:.1f} tokens per second" if self.answer_tokens > 1 else ""
        return f"first token after {self.first_token_seconds:.2f} s{rate}"


class Progress(StoppingCriteria):
    """Ends an answer when it is told to, and counts its tokens."""

    def __init__(self, stop: threading.Event):
        self.stop, self.num_tokens, self.started, self.first_token_seconds = stop, 0, time.perf_counter(), 0.0

    @property
    def seconds(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self.started

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        self.num_tokens += 1
        if self.num_tokens == 1:
            self.first_token_seconds = self.seconds
        return torch.full((len(input_ids),), self.stop.is_set(), device=input_ids.device)


class ChatSession:
    """
    One conversation, with its cache. A round that fails leaves the messages as they were.

    Args:
        model (`VisualChatForConditionalGeneration`): The model.
        processor (`VisualChatProcessor`): Its processor.
        image_memory ([`ImageMemory`], *optional*): Where images are looked up before they are computed.
        max_tokens (`int`, *optional*): Maximum tokens of a conversation before an answer; by default, what the
            tokenizer allows.
        max_images (`int`, *optional*): Maximum images of a conversation; by default, there is no limit.
        overflow (`str`, *optional*, defaults to `"error"`): What happens to a longer conversation: `"error"`, or
            `"drop_first_rounds"`, after which the model no longer reads its first rounds, down to three quarters of
            the budget. They stay among the messages, and `usage.dropped_rounds` says how many they are.
        generate_kwargs: Arguments of `generate` for every answer; by default `max_new_tokens=256`.

    Raises:
        `ValueError`: arguments of assisted or prompt-lookup decoding, which cannot continue a cache, or an unknown
            `overflow`.

    Attributes:
        messages (`list[dict]`): The conversation, answers included. Each image has a number, which stays its own.
        cache ([`ConversationCache`]): Its keys and values.
        usage ([`Usage`], *optional*): What the last answer took to compute.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        image_memory: ImageMemory | None = None,
        max_tokens: int | None = None,
        max_images: int | None = None,
        overflow: str = "error",
        **generate_kwargs,
    ):
        self.model, self.processor, self.image_memory = model, processor, image_memory
        if refused := sorted(generate_kwargs.keys() & {"assistant_model", "prompt_lookup_num_tokens"}):
            raise ValueError(f"{refused[0]} starts from an empty cache, and a ChatSession keeps one; leave it out.")
        if overflow not in OVERFLOW:
            raise ValueError(f"Unknown overflow={overflow!r}; choose one of {', '.join(OVERFLOW)}.")
        self.max_tokens = min(max_tokens or processor.tokenizer.model_max_length, processor.tokenizer.model_max_length)
        self.max_images, self.overflow = max_images, overflow
        has_length = generate_kwargs.keys() & {"max_new_tokens", "max_length", "generation_config"}
        self.generate_kwargs = generate_kwargs if has_length else {"max_new_tokens": 256, **generate_kwargs}
        self._stop = threading.Event()
        self.reset()

    def reset(self) -> None:
        """Starts a new conversation."""
        self.messages: Messages = []
        self.cache = ConversationCache()
        self.usage: Usage | None = None
        self._earlier: list[Messages] = []  # for `undo`
        self._num_dropped = self._last_number = 0

    def ask(self, question: str = "", images: Sequence | None = None, streamer=None) -> str:
        """
        Adds a round to the conversation.

        Args:
            question (`str`, *optional*): The text of the user's message.
            images (`list`, *optional*): Images shown before it: paths, URLs or PIL images.
            streamer (`BaseStreamer`, *optional*): Gets the answer token by token.

        Returns:
            `str`: The answer.
        """
        numbered = enumerate(images or (), self._last_number + 1)
        content = [{**_image_block(image), "number": number} for number, image in numbered]
        content += [{"type": "text", "text": question}] if question else []
        return self.answer([*self.messages, {"role": "user", "content": content}], streamer)

    def retry(self, streamer=None) -> str:
        """Answers the last question again."""
        return self.answer(self.messages[:-1], streamer)

    def edit(self, streamer=None, **edit) -> str:
        """
        Changes the conversation, and answers its last question again if anything before that answer has changed.

        ```python
        >>> session.edit(swap_images=[1, 2])
        >>> session.edit(edit_question=1, question="What colors are they?")
        ```

        Args:
            streamer (`BaseStreamer`, *optional*): Gets the answer token by token.
            edit: An edit in the table of `conversation_edits_visualchat.py`; an image is a path, a URL, a PIL image or
                a block.

        Returns:
            `str`: The last answer, empty if there is none.

        Raises:
            `EditError`: an edit that does not fit the conversation, which stays as it was.
        """
        if "image" in edit and not isinstance(edit["image"], dict):
            edit["image"] = _image_block(edit["image"])
        try:
            messages = apply_edit(self.messages, edit)
        except EditError as error:
            raise EditError(f"{str(error)[0].upper()}{str(error)[1:]}.") from None
        if messages[:-1] != self.messages[: len(messages) - 1]:
            return self.answer(messages[:-1], streamer, num_dropped=0)
        self._keep(messages)
        return messages[-1]["content"] if round_starts(messages) else ""

    def replace_image(self, number: int, image: Any, streamer=None) -> str:
        """Replaces the image with a number, and answers the last question again."""
        return self.edit(streamer, replace_image=number, image=image)

    def remove_image(self, number: int, streamer=None) -> str:
        """Removes the image with a number, and answers the last question again; the others keep their numbers."""
        return self.edit(streamer, remove_image=number)

    def edit_question(self, number: int, question: str, streamer=None) -> str:
        """Replaces the text of a question, counted from 1, and answers the last question again."""
        return self.edit(streamer, edit_question=number, question=question)

    def undo(self) -> None:
        """Takes the last change back: a round, an edit or another answer; a `ValueError` if there is none."""
        if not self._earlier:
            raise ValueError("There is nothing to take back.")
        self.messages, self._num_dropped = self._earlier.pop(), 0

    def stop(self) -> None:
        """Ends the answer that is being generated after its next token, from another thread or a signal handler."""
        self._stop.set()

    def answer(self, messages: Messages, streamer=None, num_dropped: int | None = None) -> str:
        """
        Answers a conversation that ends with a message of the user, whatever it shares with the one before, and keeps
        it; see [`ask`]. `num_dropped` is the number of rounds at its beginning to leave out, by default as before.
        """
        self._stop.clear()
        self._render(messages)  # raises the error of a message that is not valid
        messages = number_images([*map(_as_blocks, messages)])
        prompt, num_dropped = self._fit(messages, self._num_dropped if num_dropped is None else num_dropped)
        inputs = self._render(prompt, tokenize=True, return_dict=True, return_tensors="pt")
        image_keys = [image_key(image) for image in inputs.get("pixel_values", ())]
        inputs = inputs if self.model.device.type == "meta" else inputs.to(self.model.device)
        progress = Progress(self._stop)
        options = dict(self.generate_kwargs)
        options["stopping_criteria"] = StoppingCriteriaList([*options.get("stopping_criteria", ()), progress])
        with frozen(self.model.model):
            self._crop_cache(inputs["input_ids"], image_keys)
            num_cached, num_computed = self.cache.get_seq_length(), self._num_computed()
            generated = self.model.generate(
                **inputs, past_key_values=self.cache, image_memory=self.image_memory, streamer=streamer, **options
            )
        generated = getattr(generated, "sequences", generated)[0, inputs["input_ids"].shape[1] :]
        answer = self.processor.decode(generated, skip_special_tokens=True).strip()
        is_text = inputs["input_ids"][0] != self.model.config.image_token_id
        new_images = self._count_new_images(is_text, num_cached, image_keys, num_computed)
        is_ended = len(generated) == 0 or int(generated[-1]) in self._end_tokens()
        self.usage = Usage(
            text_tokens=int(is_text[num_cached:].sum()),
            cached_text_tokens=int(is_text[:num_cached].sum()),
            new_images=new_images,
            known_images=len(image_keys) - new_images,
            answer_tokens=progress.num_tokens,
            first_token_seconds=progress.first_token_seconds,
            seconds=progress.seconds,
            finish_reason="stop" if is_ended else "stopped" if self._stop.is_set() else "length",
            dropped_rounds=num_dropped,
        )
        self._keep([*messages, {"role": "assistant", "content": answer or "(nothing)"}], num_dropped)
        return answer

    def save(self, path: str | PathLike) -> None:
        """Writes the conversation and its images, as base64 text, to one line of JSON: a record to train on."""
        messages = number_images(self.messages)
        for _, content, place in iterate_images(messages):
            content[place] = self._embed(content[place])
        part = Path(f"{os.fspath(path)}.part")
        part.write_text(json.dumps({"messages": messages}, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(part, path)

    def load(self, path: str | PathLike) -> None:
        """
        Continues a conversation of [`save`] or, with answers, of a training file in place of the current one.

        Raises:
            `ValueError`: a file that holds no conversation with an answer at its end; the current one stays.
        """
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)} is not a JSON file: {error}.") from error
        messages = record.get("messages") if isinstance(record, dict) else None
        if not isinstance(messages, list):
            raise ValueError(f'{os.fspath(path)} holds no conversation: expected {{"messages": […]}}.')
        self._render(messages, add_generation_prompt=False)  # raises the error of a message that is not valid
        if messages[-1]["role"] != "assistant":
            raise ValueError(f"{os.fspath(path)} ends with a question; expected its answer.")
        self._keep(number_images([*map(_as_blocks, messages)]))

    def _embed(self, block: dict) -> dict:
        """An image block with its pixels as text."""
        if "base64" in block:
            return block
        source = next(block[name] for name in ("image", "path", "url") if name in block)
        self.processor.load_image(source).save(data := io.BytesIO(), "png")
        name = {} if "image" in block else {"name": os.path.basename(source)}
        kept = {key: value for key, value in block.items() if key not in ("image", "path", "url")}
        return {**kept, **name, "base64": base64.b64encode(data.getvalue()).decode()}

    def _keep(self, messages: Messages, num_dropped: int = 0) -> None:
        self._earlier.append(self.messages)
        self.messages, self._num_dropped = messages, num_dropped
        self._last_number = max([self._last_number, *(number for number, _, _ in iterate_images(messages))])

    def _fit(self, messages: Messages, num_dropped: int) -> tuple[Messages, int]:
        """The messages without the first rounds that exceed the budget, and how many these are."""
        starts, share = round_starts(messages), 1.0
        head = messages[: starts[0]]
        for number in range(min(num_dropped, len(starts) - 1), len(starts)):
            prompt = [*head, *messages[starts[number] :]]
            problem = self._exceeds(prompt, share)
            if problem is None:
                return prompt, number
            if self.overflow == "error" or number == len(starts) - 1:
                raise ValueError(problem)
            share = ROOM if number + 2 < len(starts) else 1.0  # the last round may fill the budget
        return messages, 0

    def _exceeds(self, messages: Messages, share: float) -> str | None:
        """What of a conversation is over this share of the budget."""
        num_images = sum(1 for _ in iterate_images(messages))
        num_tokens = len(self.processor.tokenizer(self._render(messages), add_special_tokens=False).input_ids)
        num_tokens += num_images * (self.processor.image_seq_length - 1)
        advice = 'Remove rounds or images, or use overflow="drop_first_rounds".'
        if self.max_images is not None and num_images > self.max_images * share:
            return f"The conversation shows {num_images} images, and at most {self.max_images} are allowed. {advice}"
        if num_tokens > self.max_tokens * share:
            return (
                f"The conversation has {num_tokens} tokens, {self.processor.image_seq_length} for an image, and at "
                f"most {self.max_tokens} are allowed. {advice}"
            )
        return None

    def _render(self, messages: Messages, add_generation_prompt: bool = True, **options) -> Any:
        """The text of messages, or its tokens and pixels; special tokens in the words of a user stay text."""
        return self.processor.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, sanitize_control_tokens=True, **options
        )

    def _num_computed(self) -> int:
        return 0 if self.image_memory is None else self.image_memory.misses

    def _end_tokens(self) -> list[int]:
        config = self.generate_kwargs.get("generation_config") or self.model.generation_config
        ids = self.generate_kwargs.get("eos_token_id", config.eos_token_id)
        return ids if isinstance(ids, list) else [ids]

    def _count_new_images(self, is_text, num_cached: int, image_keys: list[str], num_computed: int) -> int:
        """How many images were computed for the last answer."""
        num_new = int((~is_text[num_cached:]).sum()) // self.model.config.image_seq_length
        if not self.model.model.supports_image_memory():
            return num_new
        if self.image_memory is not None:
            return self._num_computed() - num_computed
        return len(set(image_keys[len(image_keys) - num_new :]))

    def _crop_cache(self, input_ids: torch.Tensor, image_keys: list[str]) -> None:
        """Leaves in the cache the prefix that it shares with a conversation, short of its last token."""
        key = known_key(self.model.model)
        # With a limit, rotary frequencies depend on the length of the whole conversation.
        has_limit = rotary_limit(self.model.config.text_config) is not None
        is_stale = key is None or key != self.cache.model_key or has_limit
        if is_stale or self.cache.num_rows != 1:
            self.cache.reset()
        else:
            self.cache.keep_shared(input_ids, [image_keys], self.model.config.image_token_id)


def _counted(number: int, name: str) -> str:
    return f"{number:,} {name}" if number == 1 else f"{number:,} {name}s"


def _image_block(image: Any) -> dict:
    if not isinstance(image, (str, PathLike)):
        return {"type": "image", "image": image}
    return {"type": "image", "url" if str(image).startswith(("http://", "https://")) else "path": str(image)}


def _as_blocks(message: dict) -> dict:
    """A message of the user with its text as a block."""
    if message["role"] != "user" or not isinstance(message["content"], str):
        return message
    return {**message, "content": [{"type": "text", "text": message["content"]}]}
