"""Turns conversations into training batches: padded, or packed into one row."""

import json
import warnings
from dataclasses import dataclass, field

import torch
from torch.utils.data import get_worker_info
from transformers import BatchFeature

from .conversation_files import count_tokens
from .conversation_visualchat import image_source, is_image
from .image_archives import decode_image_text, open_training_image
from .processing_visualchat import IGNORE_INDEX, VisualChatProcessor


OVERLONG = ("error", "drop_first_rounds", "drop_last_rounds", "skip")
COUNTS = ("shortened", "skipped", "broken")
MAX_WORKERS = 256  # beyond, workers share their counters


@dataclass
class DataCollatorForVisualChat:
    """
    Renders, tokenizes and batches conversations; the loss is on answers and their end-of-sequence token.

    A conversation that cannot be used is left out and counted, so that a long run does not end over it. Of a batch of
    which nothing is left there is one padding token without a label; in training its loss is zero.

    Args:
        processor (`VisualChatProcessor`): The processor of the model.
        max_length (`int`, *optional*): The most tokens that a conversation may have; by default what the model reads.
        overlong (`str`, *optional*, defaults to `"error"`): What becomes of a conversation that has more:
            `"drop_first_rounds"` and `"drop_last_rounds"` leave out whole rounds, with their images, until it fits; no
            cut goes through an image or an answer. `"skip"` leaves it out, as the others do if not one round fits.
        packing (`bool`, *optional*, defaults to `False`): Puts all conversations of a batch into one row, one after
            the other without padding, which no attention crosses: `position_ids` start anew with each.
        max_broken (`int`, *optional*, defaults to 100): How many conversations with an image that is not there, cannot
            be read or is one pixel high or wide are left out, each with a warning, before one is an error. Every rank
            counts its own.

    Raises:
        `ValueError`: a conversation longer than `max_length`, or without an answer; or one broken image too many.
    """

    processor: VisualChatProcessor
    max_length: int | None = None
    overlong: str = "error"
    packing: bool = False
    max_broken: int = 100
    # A row for every worker of a data loader, in shared memory: what workers count is seen here.
    _counts: torch.Tensor = field(init=False, repr=False)

    def __post_init__(self):
        if self.overlong not in OVERLONG:
            raise ValueError(f"overlong is {self.overlong!r}; choose one of {', '.join(OVERLONG)}.")
        if self.max_broken < 0:
            raise ValueError(f"max_broken is {self.max_broken}; use a number from 0 up.")
        self._counts = torch.zeros(MAX_WORKERS + 1, len(COUNTS), dtype=torch.int64).share_memory_()

    @property
    def counts(self) -> dict[str, int]:
        """Conversations so far: `shortened` by rounds, `skipped` because too long, left out as `broken`."""
        return dict(zip(COUNTS, self._counts.sum(dim=0).tolist()))

    @property
    def limit(self) -> int:
        """The most tokens of a conversation."""
        most = self.processor.tokenizer.model_max_length
        return most if self.max_length is None else min(self.max_length, most)

    def __call__(self, examples: list[dict]) -> BatchFeature:
        """
        Args:
            examples (`list[dict]`): Each with `messages`, a conversation or its JSON text; or with `pack`, a list of
                such examples.

        Returns:
            `BatchFeature` with `input_ids`, `mm_token_type_ids` and `labels` (B, S), `attention_mask` (B, S) or, with
            packing, `position_ids` (1, S), and `pixel_values` (images, channels, height, width) if any conversation
            has an image.
        """
        conversations = []
        for example in (part for entry in examples for part in entry.get("pack", [entry])):
            messages = example["messages"]
            messages = self._fit(json.loads(messages) if isinstance(messages, str) else messages)
            if messages is not None and (opened := self._open_images(messages)) is not None:
                conversations.append(opened)
        if not conversations:
            return self._of_nothing()
        batch: BatchFeature = self.processor.apply_chat_template(
            conversations,
            return_labels=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "right"},
        )
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        has_answers = (batch["labels"] != IGNORE_INDEX).any(dim=1).tolist()
        for messages, length, has_answer in zip(conversations, lengths, has_answers):
            if length > self.limit:
                raise ValueError(
                    f"A conversation has {length} tokens, more than max_length={self.max_length}: "
                    f"{messages!r:.200}… Leave out rounds or images, raise max_length, or set overlong."
                )
            if not has_answer:
                raise ValueError(f"A conversation has no answer to learn from: {messages!r:.200}…")
        return _pack(batch) if self.packing else batch

    def _fit(self, messages: list[dict]) -> list[dict] | None:
        """What is left of a conversation that is too long: fewer rounds, or nothing."""
        if self.overlong == "error" or count_tokens(messages, self.processor) <= self.limit:
            return messages
        start = int(messages[0]["role"] == "system")
        system, rest = messages[:start], messages[start:]
        rounds = [rest[place : place + 2] for place in range(0, len(rest), 2)]
        while self.overlong != "skip" and len(rounds) > 1:
            rounds = rounds[1:] if self.overlong == "drop_first_rounds" else rounds[:-1]
            shortened = [*system, *(message for turns in rounds for message in turns)]
            if count_tokens(shortened, self.processor) <= self.limit:
                self._count("shortened")
                return shortened
        self._count("skipped")
        return None

    def _open_images(self, messages: list[dict]) -> list[dict] | None:
        """Messages in which every image is open, or nothing if one cannot be opened."""
        try:
            return [
                {**message, "content": [self._open_image(block) for block in message["content"]]}
                if isinstance(message, dict) and isinstance(message.get("content"), (list, tuple))
                else message
                for message in messages
            ]
        except (ValueError, OSError) as error:
            self._count("broken")
            num_broken = self.counts["broken"]
            if num_broken > self.max_broken:
                raise ValueError(
                    f"{error} It is conversation {num_broken} with an image that cannot be used, and "
                    f"max_broken={self.max_broken}."
                ) from error
            warnings.warn(
                f"A conversation is left out, {num_broken} of at most {self.max_broken}: {error}", stacklevel=2
            )
            return None

    def _open_image(self, block):
        if not is_image(block) or (source := image_source(block)) is None:
            return block
        if isinstance(block.get("base64"), str):
            source = decode_image_text(source)  # and not a file of that name
        return {"type": "image", "image": open_training_image(source)}

    def _count(self, what: str) -> None:
        worker = get_worker_info()
        row = 0 if worker is None else 1 + worker.id % MAX_WORKERS
        self._counts[row, COUNTS.index(what)] += 1

    def _of_nothing(self) -> BatchFeature:
        row = torch.tensor([[self.processor.tokenizer.pad_token_id]])
        batch = {"input_ids": row, "mm_token_type_ids": torch.zeros_like(row)}
        batch["labels"] = torch.full_like(row, IGNORE_INDEX)
        batch |= {"position_ids": torch.zeros_like(row)} if self.packing else {"attention_mask": torch.ones_like(row)}
        return BatchFeature(batch)


def _pack(batch: BatchFeature) -> BatchFeature:
    """Padded rows (B, S) one after the other, (1, S) without padding."""
    mask = batch.pop("attention_mask").bool()
    batch["position_ids"] = torch.arange(mask.shape[1]).expand(mask.shape)
    for name in ("input_ids", "mm_token_type_ids", "labels", "position_ids"):
        batch[name] = batch[name][mask][None]
    return batch
