"""Turns conversations into padded training batches."""

import json
from dataclasses import dataclass, field

from transformers import BatchFeature

from .conversation_files import count_tokens
from .image_archives import resolve_archived
from .processing_visualchat import VisualChatProcessor


OVERLONG = ("error", "drop_first_rounds", "drop_last_rounds")


@dataclass
class DataCollatorForVisualChat:
    """
    Renders, tokenizes and pads a batch of conversations; the loss is on answers and their end-of-sequence token.

    Args:
        processor (`VisualChatProcessor`): The processor of the model.
        max_length (`int`, *optional*): The most tokens that a conversation may have; by default what the model reads.
        overlong (`str`, *optional*, defaults to `"error"`): What becomes of a conversation that has more:
            `"drop_first_rounds"` and `"drop_last_rounds"` leave out whole rounds, with their images, until it fits; no
            cut goes through an image or an answer.

    Attributes:
        num_shortened (`int`): Conversations that rounds were left out of.

    Raises:
        `ValueError`: a conversation longer than `max_length` (or of which not even one round fits), or without an
            answer.
    """

    processor: VisualChatProcessor
    max_length: int | None = None
    overlong: str = "error"
    num_shortened: int = field(default=0, init=False)

    def __post_init__(self):
        if self.overlong not in OVERLONG:
            raise ValueError(f"overlong is {self.overlong!r}; choose one of {', '.join(OVERLONG)}.")

    def __call__(self, examples: list[dict]) -> BatchFeature:
        """
        Args:
            examples (`list[dict]`): Each with `messages`, a conversation or its JSON text.

        Returns:
            `BatchFeature` with `input_ids`, `attention_mask`, `mm_token_type_ids` and `labels` (B, S), and
            `pixel_values` (images, channels, height, width) if any conversation has an image.
        """
        conversations = [
            resolve_archived(json.loads(messages) if isinstance(messages, str) else messages)
            for messages in (example["messages"] for example in examples)
        ]
        if self.overlong != "error":
            conversations = [self._shorten(messages) for messages in conversations]
        batch: BatchFeature = self.processor.apply_chat_template(
            conversations,
            return_labels=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "right"},
        )
        lengths = batch["attention_mask"].sum(dim=1)
        for index, length in enumerate(lengths.tolist()):
            if self.max_length is not None and length > self.max_length:
                raise ValueError(
                    f"A conversation has {length} tokens, more than max_length={self.max_length}: "
                    f"{conversations[index]!r:.200}… Leave out rounds or images, or raise max_length."
                )
        for index, has_answer in enumerate((batch["labels"] != -100).any(dim=1).tolist()):
            if not has_answer:
                raise ValueError(f"A conversation has no answer to learn from: {conversations[index]!r:.200}…")
        return batch

    def _shorten(self, messages: list[dict]) -> list[dict]:
        """Leaves out whole rounds until the conversation fits."""
        limit = min(
            self.max_length or self.processor.tokenizer.model_max_length, self.processor.tokenizer.model_max_length
        )
        start = int(messages[0]["role"] == "system")
        system, rest = messages[:start], messages[start:]
        rounds = [rest[place : place + 2] for place in range(0, len(rest), 2)]
        num_rounds = len(rounds)
        shortened = messages
        while len(rounds) > 1 and count_tokens(shortened, self.processor) > limit:
            rounds = rounds[1:] if self.overlong == "drop_first_rounds" else rounds[:-1]
            shortened = [*system, *(message for turns in rounds for message in turns)]
        self.num_shortened += len(rounds) < num_rounds
        return shortened
