"""Conversations as the model gets them, for a person to read."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, pairwise, zip_longest
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPImageProcessor, PreTrainedTokenizerFast

from ..data.collator import DataCollatorForVisualChat
from ..data.images import ImageReference
from ..data.mixture import Mixture
from ..processing_visualchat import IGNORE_INDEX, VisualChatProcessor


ESTIMATED_IMAGE_LENGTH = 256  # tokens, as of a vision tower with 14-pixel patches on 224 by 224 pixels


@dataclass
class Sample:
    """A conversation as the model gets it."""

    source: str
    where: list[str]  # files and records
    pieces: list[tuple[str, bool]]  # its text, with `<image>` for an image, and whether the loss is on it
    images: list[ImageReference]
    num_tokens: int
    num_learned: int  # tokens with a loss


def draw_samples(mixture: Mixture, processor: VisualChatProcessor, count: int) -> list[Sample]:
    """The first training conversations that can be collated, all sources in turn and at least one of each."""

    def draw(source: str, indices: range) -> Iterator[Sample]:
        for index in indices:
            with contextlib.suppress(ValueError):
                yield draw_sample(mixture.train[index], processor, source)

    ends = np.cumsum([num_train for num_train, _ in mixture.sizes.values()]).tolist()
    drawn = [draw(name, range(*bounds)) for name, bounds in zip(mixture.sizes, pairwise([0, *ends]))]
    in_turn = (sample for turn in zip_longest(*drawn) for sample in turn if sample is not None)
    return list(islice(in_turn, max(count, len(drawn))))


def draw_sample(example: dict, processor: VisualChatProcessor, source: str = "") -> Sample:
    """A conversation after processor and collator; a `ValueError` if it cannot be collated."""
    batch = DataCollatorForVisualChat(processor, max_broken=0)([example])
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    text = "".join(piece for piece, _ in processor.split_answers(example["messages"]))
    encoded = processor.tokenizer(text, return_offsets_mapping=True, verbose=False)
    pieces: list[tuple[str, bool]] = []
    index, end = 0, 0
    tokens: Any = zip(encoded["input_ids"], encoded["offset_mapping"])
    for token, (start, stop) in tokens:
        has_loss = labels[index] != IGNORE_INDEX
        shown = text[end:stop].replace(processor.image_token, "<image>") if start >= end else ""
        if pieces and pieces[-1][1] == has_loss:
            pieces[-1] = (pieces[-1][0] + shown, has_loss)
        else:
            pieces.append((shown, has_loss))
        end = max(end, stop)
        index += processor.image_seq_length if token == processor.image_token_id else 1
    blocks = (block for message in example["messages"] for block in message["content"] if isinstance(block, dict))
    images = [image for block in blocks if (image := ImageReference.from_block(block)) is not None]
    return Sample(source, example["where"], pieces, images, len(ids), sum(label != IGNORE_INDEX for label in labels))


def make_estimating_processor() -> VisualChatProcessor:
    """A processor that needs no checkpoint: one token per word or punctuation mark, 256 per image."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<pad>": 1, "</s>": 2, "<image>": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), "removed", invert=True)
    tokenizer.decoder = decoders.Fuse()
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>", "extra_special_tokens": ["<image>"]}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    size = {"height": 32, "width": 32}
    image_processor = CLIPImageProcessor(size=size, crop_size=size)
    return VisualChatProcessor(image_processor, fast, image_seq_length=ESTIMATED_IMAGE_LENGTH)
