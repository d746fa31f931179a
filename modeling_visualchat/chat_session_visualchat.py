"""
A conversation with a model in which any message or image may change: only what follows a change is computed again.

    session = model.start_chat(processor, image_memory=ImageMemory())
    session.ask("What is it?", images=["cat.png"])
    session.ask("And the difference to this one?", images=["dog.png"])
    session.replace_image(1, "lion.png")                 # answers the last question again
"""

import copy
from os import PathLike
from typing import Any

import torch

from .cache_visualchat import ConversationCache
from .image_memory_visualchat import ImageMemory
from .key_rotation_visualchat import rotary_limit
from .weights_key_visualchat import frozen, image_key, known_key


class ChatSession:
    """
    One conversation, with its cache. A round that fails leaves the messages as they were.

    Args:
        model (`VisualChatForConditionalGeneration`): The model.
        processor (`VisualChatProcessor`): Its processor.
        image_memory ([`ImageMemory`], *optional*): Where images are looked up before they are computed.
        generate_kwargs: Arguments of `generate` for every answer; by default `max_new_tokens=256`.

    Raises:
        `ValueError`: arguments of assisted or prompt-lookup decoding, which cannot continue a cache.

    Attributes:
        messages (`list[dict]`): The conversation, answers included.
        cache ([`ConversationCache`]): Its keys and values.
    """

    def __init__(self, model: Any, processor: Any, image_memory: ImageMemory | None = None, **generate_kwargs):
        self.model, self.processor, self.image_memory = model, processor, image_memory
        if refused := sorted(generate_kwargs.keys() & {"assistant_model", "prompt_lookup_num_tokens"}):
            raise ValueError(f"{refused[0]} starts from an empty cache, and a ChatSession keeps one; leave it out.")
        has_length = generate_kwargs.keys() & {"max_new_tokens", "max_length", "generation_config"}
        self.generate_kwargs = generate_kwargs if has_length else {"max_new_tokens": 256, **generate_kwargs}
        self.reset()

    def reset(self) -> None:
        """Starts a new conversation."""
        self.messages: list[dict] = []
        self.cache = ConversationCache()

    def ask(self, question: str = "", images: list | None = None, streamer=None) -> str:
        """
        Adds a round to the conversation.

        Args:
            question (`str`, *optional*): The text of the user's message.
            images (`list`, *optional*): Images shown before it: paths, URLs or PIL images.
            streamer (`BaseStreamer`, *optional*): Gets the answer token by token.

        Returns:
            `str`: The answer.
        """
        content = [_image_block(image) for image in images or ()]
        content += [{"type": "text", "text": question}] if question else []
        return self.answer([*self.messages, {"role": "user", "content": content}], streamer)

    def retry(self, streamer=None) -> str:
        """Answers the last question again."""
        return self.answer(self.messages[:-1], streamer)

    def replace_image(self, number: int, image: Any, streamer=None) -> str:
        """Replaces an image, counted from 1, and answers the last question again."""
        messages, content, index = self._find("image", number)
        content[index] = _image_block(image)
        return self.answer(messages[:-1], streamer)

    def remove_image(self, number: int, streamer=None) -> str:
        """Removes an image, counted from 1, and answers the last question again."""
        messages, content, index = self._find("image", number)
        if len(content) == 1:
            raise ValueError(f"Image {number} is the whole content of its message; nothing would be left of it.")
        del content[index]
        return self.answer(messages[:-1], streamer)

    def edit_question(self, number: int, question: str, streamer=None) -> str:
        """Replaces the text of a question, counted from 1, and answers the last question again."""
        messages, content, index = self._find("text", number)
        content[index] = {"type": "text", "text": question}
        return self.answer(messages[:-1], streamer)

    def answer(self, messages: list[dict], streamer=None) -> str:
        """
        Answers a conversation that ends with a message of the user, whatever it shares with the one before, and keeps
        it; see [`ask`].
        """
        inputs = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        image_keys = [image_key(image) for image in inputs.get("pixel_values", ())]
        inputs = inputs if self.model.device.type == "meta" else inputs.to(self.model.device)
        with frozen(self.model.model):
            self._crop_cache(inputs["input_ids"], image_keys)
            generated = self.model.generate(
                **inputs,
                past_key_values=self.cache,
                image_memory=self.image_memory,
                streamer=streamer,
                **self.generate_kwargs,
            )
        generated = getattr(generated, "sequences", generated)
        answer = self.processor.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        self.messages = [*map(_as_blocks, messages), {"role": "assistant", "content": answer or "(nothing)"}]
        return answer

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

    def _find(self, block_type: str, number: int) -> tuple[list[dict], list, int]:
        """A copy of the messages, and in it the content that holds the block with this number, and its index."""
        messages = copy.deepcopy(self.messages)
        found = [
            (message["content"], index)
            for message in messages
            if message["role"] == "user"
            for index, block in enumerate(message["content"])
            if block["type"] == block_type
        ]
        if not 1 <= number <= len(found):
            name = "image" if block_type == "image" else "question"
            raise ValueError(f"There is no {name} {number}; the conversation has {len(found)}.")
        return messages, *found[number - 1]


def _image_block(image: Any) -> dict:
    if not isinstance(image, (str, PathLike)):
        return {"type": "image", "image": image}
    return {"type": "image", "url" if str(image).startswith(("http://", "https://")) else "path": str(image)}


def _as_blocks(message: dict) -> dict:
    """A message of the user with its text as a block."""
    if message["role"] != "user" or not isinstance(message["content"], str):
        return message
    return {**message, "content": [{"type": "text", "text": message["content"]}]}
