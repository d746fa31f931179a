"""Turns conversations into padded training batches."""

import json
from dataclasses import dataclass

from transformers import BatchFeature

from .image_archives import resolve_archived
from .processing_visualchat import VisualChatProcessor


@dataclass
class DataCollatorForVisualChat:
    """
    Renders, tokenizes and pads a batch of conversations; the loss is on answers and their end-of-sequence token.

    Args:
        processor (`VisualChatProcessor`): The processor of the model.
        max_length (`int`, *optional*): The most tokens that a conversation may have; by default what the model reads.

    Raises:
        `ValueError`: a conversation longer than `max_length`, or without an answer.
    """

    processor: VisualChatProcessor
    max_length: int | None = None

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
