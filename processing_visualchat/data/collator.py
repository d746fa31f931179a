"""Collates conversations into training batches: padded, or packed into one row."""

import warnings
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from PIL.Image import Image
from torch.utils.data import get_worker_info
from transformers import BatchFeature

from ..conversation_visualchat import has_loss, image_source, is_image, map_blocks
from ..processing_visualchat import IGNORE_INDEX, VisualChatProcessor
from .batch_facts import BatchFacts, measure_answers
from .conversation import messages_of
from .files import digest_of
from .images import ImageReference, open_image
from .lengths import count_tokens


OVERLONG = ("error", "drop_first_rounds", "drop_last_rounds", "skip")
COUNTS = ("shortened", "skipped", "broken")
ORIGIN = ("where", "source")  # keys of an example that say where it is from
MAX_WORKERS = 256  # beyond, workers share their counters
MOST_BROKEN = 2**20  # images that are told apart


@dataclass
class DataCollatorForVisualChat:
    """
    Renders, tokenizes and batches conversations; the loss is on answers and their end-of-sequence token. An image that
    several conversations of a batch show is opened and preprocessed once.

    An unusable conversation is left out and counted, so that it does not end a long run. An empty batch consists of
    one padding token without a label; in training its loss is zero.

    Args:
        processor (`VisualChatProcessor`): The processor of the model.
        max_length (`int`, *optional*): Maximum tokens of a conversation; by default the model's.
        overlong (`str`, *optional*, defaults to `"error"`): How over-length conversations are handled:
            `"drop_first_rounds"` and `"drop_last_rounds"` leave out whole rounds, with their images, until it fits;
            `"skip"` leaves out the conversation, as the others do if no single round fits.
        packing (`bool`, *optional*, defaults to `False`): Packs all conversations of a batch into one row without
            padding. `position_ids` restart with each, and no attention crosses from one to another.
        max_broken (`int`, *optional*, defaults to 100): Maximum images of a rank that are missing, broken or one pixel
            wide, each counted once, however many conversations and epochs show it. Their conversations are left out,
            each with a warning, and one image more is an error.
        return_facts (`bool`, *optional*, defaults to `False`): Adds `facts`, the [`BatchFacts`] of the batch, which
            are not for the model.

    Raises:
        `ValueError`: a conversation longer than `max_length`, or without an answer; or one broken image too many.
    """

    processor: VisualChatProcessor
    max_length: int | None = None
    overlong: str = "error"
    packing: bool = False
    max_broken: int = 100
    return_facts: bool = False
    # One row per data loader worker, in shared memory, so that their counts are seen here.
    _counts: torch.Tensor = field(init=False, repr=False)
    # Hashes of broken images, 0 where there is room; also shared.
    _broken: torch.Tensor = field(init=False, repr=False)

    def __post_init__(self):
        if self.overlong not in OVERLONG:
            raise ValueError(f"overlong is {self.overlong!r}; choose one of {', '.join(OVERLONG)}.")
        if self.max_broken < 0:
            raise ValueError(f"max_broken is {self.max_broken}; use a number from 0 up.")
        self._counts = torch.zeros(MAX_WORKERS + 1, len(COUNTS), dtype=torch.int64).share_memory_()
        self._broken = torch.zeros(min(self.max_broken, MOST_BROKEN) + 1, dtype=torch.int64).share_memory_()

    @property
    def counts(self) -> dict[str, int]:
        """Conversations so far: `shortened` by rounds, `skipped` as over-length, left out for a `broken` image."""
        return dict(zip(COUNTS, self._counts.sum(dim=0).tolist()))

    @property
    def limit(self) -> int:
        """Maximum tokens of a conversation."""
        model_limit = self.processor.tokenizer.model_max_length
        return model_limit if self.max_length is None else min(self.max_length, model_limit)

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
        conversations, used = [], []
        images: dict[ImageReference | int, Image] = {}  # opened for this batch
        for example in (part for entry in examples for part in entry.get("pack", [entry])):
            messages = self._shorten(messages_of(example))
            if messages is not None and (opened := self._open_images(messages, images)) is not None:
                conversations.append(opened)
                used.append({"messages": messages, **{key: example[key] for key in ORIGIN if key in example}})
        if not conversations:
            return self._empty_batch()
        places = [" + ".join(example.get("where") or ["A conversation"]) for example in used]
        padding = {"padding": True, "padding_side": "right"}
        try:
            batch: BatchFeature = self.processor.apply_chat_template(
                conversations, return_labels=True, return_tensors="pt", processor_kwargs=padding
            )
        except ValueError:  # the processor, which knows no records, refuses what the model cannot read
            self._refuse_overlong(places, [count_tokens(messages, self.processor) for messages in conversations])
            raise
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        has_answers = (batch["labels"] != IGNORE_INDEX).any(dim=1).tolist()
        self._refuse_overlong(places, lengths)
        for place, messages, has_answer in zip(places, conversations, has_answers):
            if not has_answer:
                raise ValueError(f"{place} has no answer to learn from: {messages!r:.200}…")
        if self.return_facts:
            batch["facts"] = self._describe(batch, used, conversations)
        return _pack(batch) if self.packing else batch

    def _describe(self, batch: BatchFeature, used: list[dict], conversations: list[list[dict]]) -> BatchFacts:
        """The facts of a padded batch, of examples and the same conversations with their images opened."""
        contents = [message["content"] for messages in conversations for message in messages]
        blocks = [block for content in contents if not isinstance(content, str) for block in content]
        images = [id(block["image"]) for block in blocks if is_image(block)]
        num_tokens = int(batch["attention_mask"].sum())
        num_padding = 0 if self.packing else batch["attention_mask"].numel() - num_tokens
        answers = measure_answers(batch["labels"], IGNORE_INDEX)
        return BatchFacts(used, answers, num_tokens, num_padding, len(images), len(set(images)))

    def _refuse_overlong(self, places: list[str], lengths: list[int]) -> None:
        for place, length in zip(places, lengths):
            if length > self.limit:
                raise ValueError(
                    f"{place} has {length} tokens, more than max_length={self.limit}. Set overlong (--overlong of "
                    "finetune.py) to drop_first_rounds, drop_last_rounds or skip, or raise max_length."
                )

    def _shorten(self, messages: list[dict]) -> list[dict] | None:
        """A conversation within the limit, with fewer rounds if need be; `None` if it has to be skipped."""
        if self.overlong == "error" or count_tokens(messages, self.processor) <= self.limit:
            return messages
        start = int(messages[0]["role"] == "system")
        system, rest = messages[:start], messages[start:]
        rounds = [rest[index : index + 2] for index in range(0, len(rest), 2)]
        while self.overlong != "skip" and len(rounds) > 1:
            rounds = rounds[1:] if self.overlong == "drop_first_rounds" else rounds[:-1]
            shortened = [*system, *(message for turns in rounds for message in turns)]
            if any(map(has_loss, shortened)) and count_tokens(shortened, self.processor) <= self.limit:
                self._count("shortened")
                return shortened
        self._count("skipped")
        return None

    def _open_images(self, messages: list[dict], images: dict[ImageReference | int, Image]) -> list[dict] | None:
        """Messages with all images opened, or `None` if one cannot be opened."""
        try:
            return map_blocks(messages, partial(self._open_image, images))
        except (ValueError, OSError) as error:
            self._count("broken")
            num_broken = int(self._broken.count_nonzero())
            if num_broken == len(self._broken):
                raise ValueError(
                    f"{error} It is image {num_broken} that cannot be used, and max_broken={self.max_broken}."
                ) from error
            message = f"{num_broken} of at most {self.max_broken} images cannot be used: {error}"
            warnings.warn(f"A conversation is left out, {message}", stacklevel=2)
            return None

    def _open_image(self, images: dict[ImageReference | int, Image], block):
        if not is_image(block) or (source := image_source(block)) is None:
            return block
        reference = ImageReference.from_block(block)
        key = id(source) if reference is None else reference  # an open image is the same object
        try:
            image = images.get(key) or (open_image(source) if reference is None else reference.open())
        except (ValueError, OSError) as error:
            self._note_broken(str(reference or error))
            raise
        images[key] = image
        return {"type": "image", "image": image}

    def _note_broken(self, name: str) -> None:
        """Counts a broken image once, in whichever worker and epoch."""
        number = int(digest_of(name.encode("utf-8", "replace"))[:15], 16) + 1
        free = (self._broken == 0).nonzero()
        if len(free) and not (self._broken == number).any():
            self._broken[free[number % len(free)]] = number  # workers rarely choose the same place

    def _count(self, what: str) -> None:
        worker = get_worker_info()
        row = 0 if worker is None else 1 + worker.id % MAX_WORKERS
        self._counts[row, COUNTS.index(what)] += 1

    def _empty_batch(self) -> BatchFeature:
        row = torch.tensor([[self.processor.tokenizer.pad_token_id]])
        batch: dict[str, Any] = {"input_ids": row, "mm_token_type_ids": torch.zeros_like(row)}
        batch["labels"] = torch.full_like(row, IGNORE_INDEX)
        batch |= {"position_ids": torch.zeros_like(row)} if self.packing else {"attention_mask": torch.ones_like(row)}
        if self.return_facts:
            batch["facts"] = BatchFacts([], [], 0, 1, 0, 0)
        return BatchFeature(batch)


def _pack(batch: BatchFeature) -> BatchFeature:
    """Padded rows (B, S) as one row (1, S) without padding."""
    mask = batch.pop("attention_mask").bool()
    batch["position_ids"] = torch.arange(mask.shape[1]).expand(mask.shape)
    for name in ("input_ids", "mm_token_type_ids", "labels", "position_ids"):
        batch[name] = batch[name][mask][None]
    return batch
