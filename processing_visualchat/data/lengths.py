"""The lengths of conversations, by which they are batched or packed."""

import json
from bisect import bisect_left
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, config

from ..conversation_visualchat import is_image
from ..processing_visualchat import VisualChatProcessor
from .conversation import messages_of
from .files import DATA_VERSION, digest_of


MEASURES = ("length", "num_trained", "num_images", "num_rounds")
TRANSIENT = ("padding", "truncation")  # tokenizer settings that its last call leaves behind


def count_tokens(messages: list[dict], processor: VisualChatProcessor) -> int:
    """The tokens of a conversation, including those of its images, which are not opened."""
    return _count(messages, processor)[0]


def _count(messages: list[dict], processor: VisualChatProcessor) -> tuple[int, int]:
    """The tokens of a conversation in training, and those of them with a loss: the answers."""
    pieces = processor.split_answers(messages)
    text = "".join(piece for piece, _ in pieces)
    offsets: Any = processor.tokenizer(text, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    starts = [start for start, _ in offsets]
    ends = list(accumulate(len(piece) for piece, _ in pieces))
    num_trained = sum(
        bisect_left(starts, end) - bisect_left(starts, end - len(piece))
        for end, (piece, is_learned) in zip(ends, pieces)
        if is_learned
    )
    return len(offsets) + text.count(processor.image_token) * (processor.image_seq_length - 1), num_trained


def list_overlong(dataset: Dataset, limit: int, count: int = 3) -> tuple[int, list[str]]:
    """The number of conversations of a measured dataset with more than `limit` tokens, and the names of the first."""
    lengths = np.asarray(dataset.with_format(None)["length"][:])
    overlong = np.flatnonzero(lengths > limit).tolist()
    names = []
    for index in overlong[:count]:
        where = dataset[index].get("where") or [f"conversation {index}"]
        names.append(f"{' + '.join(where)} ({lengths[index]:,} tokens)")
    return len(overlong), names


def measure(example: dict, processor: VisualChatProcessor) -> dict[str, int]:
    """The [`MEASURES`] of an example."""
    messages = messages_of(example)
    try:
        length, num_trained = _count(messages, processor)
    except ValueError as error:
        raise ValueError(f"{example.get('where', 'A conversation')} cannot be rendered: {error}") from error
    return {
        "length": length,
        "num_trained": num_trained,
        "num_images": sum(is_image(block) for message in messages for block in message["content"]),
        "num_rounds": sum(message["role"] == "assistant" for message in messages),
    }


def measure_lengths(dataset: Dataset, processor: VisualChatProcessor, num_proc: int | None = None) -> Dataset:
    """
    Adds the lengths of conversations, which packing and `train_sampling_strategy: group_by_length` of
    `TrainingArguments` need. No image is opened, and the result is cached.

    Args:
        dataset (`datasets.Dataset`): Examples with `messages`, a conversation or its JSON text.
        processor (`VisualChatProcessor`): The processor of the model.
        num_proc (`int`, *optional*): The number of processes.

    Returns:
        The dataset with the columns `length` (tokens, including those of images), `num_trained` (tokens with a loss),
        `num_images` and `num_rounds`.
    """
    key = digest_of(f"{dataset._fingerprint} {_describe(processor)} {DATA_VERSION}".encode())
    Path(config.HF_DATASETS_CACHE).mkdir(parents=True, exist_ok=True)

    output_format, plain = dataset.format, dataset.with_format(None)
    measured = dataset.map(
        partial(measure, processor=processor),
        remove_columns=dataset.column_names,
        num_proc=num_proc,
        cache_file_name=str(Path(config.HF_DATASETS_CACHE) / f"visualchat-lengths-{key}.arrow"),
        new_fingerprint=key,
        desc="Measuring conversations",
    ).with_format(None)
    for name in MEASURES:
        values = measured[name][:] if name in measured.column_names else []  # without examples there is no column
        if name in plain.column_names:
            plain = plain.remove_columns(name)
        plain = plain.add_column(name, np.asarray(values, dtype=np.int64))
    if output_format["type"] is None:
        return plain
    output_format["columns"] = [name for name in output_format["columns"] if name not in MEASURES]
    options = output_format.pop("format_kwargs")
    return plain.with_format(**output_format, **options)


def _describe(processor: VisualChatProcessor) -> str:
    """Everything that the lengths of conversations depend on."""
    tokenizer: Any = processor.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        described = tokenizer.get_vocab()
    else:
        described = {key: value for key, value in json.loads(backend.to_str()).items() if key not in TRANSIENT}
    return json.dumps([described, processor.chat_template, processor.image_seq_length, processor.image_token])
