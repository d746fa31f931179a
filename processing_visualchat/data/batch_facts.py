"""What a batch is made of beside its tensors, for the accounts of a training run."""

import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..conversation_visualchat import has_loss, image_source, is_image, map_blocks
from ..image_loading_visualchat import load_image
from .images import ImageReference
from .ingestion import split_place


@dataclass(frozen=True)
class BatchFacts:
    """
    Args:
        examples (`list[dict]`): The conversations of the batch in order, without those that were left out: `messages`
            as they are trained on, images as they were given, and `where` and `source` if the data have them.
        answer_lengths (`list[int]`): Tokens with a loss of each answer, in order.
        num_tokens, num_padding (`int`): Tokens without padding, and of padding.
        num_images, num_unique_images (`int`): Images that are shown, and the different ones by their references.
    """

    examples: list[dict]
    answer_lengths: list[int]
    num_tokens: int
    num_padding: int
    num_images: int
    num_unique_images: int

    def answers(self) -> Iterator[tuple[int, int]]:
        """The conversation (from 0) and the round (from 1) of each answer with a loss, in order."""
        for number, example in enumerate(self.examples):
            answers = (message for message in example["messages"] if message["role"] == "assistant")
            yield from ((number, turn) for turn, message in enumerate(answers, start=1) if has_loss(message))


def place_of(example: dict, number: int) -> str:
    """The files and records of an example; without them, its source and a number."""
    return " + ".join(example.get("where") or [f"{source_of(example)}, conversation {number}"])


def source_of(example: dict) -> str:
    """The data set of an example: its name in a mixture, or its file without the folder."""
    source = example.get("source") or split_place((example.get("where") or ["data"])[0])[0]
    return os.path.basename(source) if os.path.isabs(source) else source


def measure_answers(labels: torch.Tensor, ignore_index: int = -100) -> list[int]:
    """The lengths of the runs of labels (B, S), which are the answers; other tokens are between them."""
    is_label = labels != ignore_index
    is_start = is_label & ~torch.nn.functional.pad(is_label[:, :-1], (1, 0))
    numbers = is_start.flatten().cumsum(0)[is_label.flatten()] - 1
    return numbers.bincount().tolist()


def save_examples(path: Path, examples: Sequence[dict]) -> None:
    """Writes conversations as JSON lines that can be trained on wherever they are: images are inside, but for URLs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    records = ({**example, "messages": map_blocks(example["messages"], _embed)} for example in examples)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def _embed(block):
    if not is_image(block):
        return block
    reference = ImageReference.from_block(block)
    if reference is not None:
        return (reference if reference.kind == "url" else ImageReference.from_bytes(reference.read())).block()
    data = io.BytesIO()
    load_image(image_source(block)).save(data, "PNG")
    return ImageReference.from_bytes(data.getvalue()).block()
