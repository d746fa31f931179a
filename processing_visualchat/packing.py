"""
Which conversations go into a row together: measured once, packed by length, balanced over tokens and images.

    dataset = measure_lengths(mixture.train, processor)
    packs = pack_conversations(dataset, max_length=4096)
    Trainer(…, train_dataset=packs, data_collator=DataCollatorForVisualChat(processor, packing=True))

A step of training costs what its tokens cost in the decoder and what its images cost in the vision tower, so packs are
made alike in both: conversations, the largest first, go where they leave the lesser load (longest processing time
first, in two dimensions).
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, List, Value, config

from .conversation_files import count_tokens
from .conversation_visualchat import is_image
from .image_archives import digest_of
from .processing_visualchat import VisualChatProcessor


MEASURES = ("length", "num_images", "num_rounds")
LONGEST = 10**9  # tokens; a tokenizer without a limit says more
WINDOW = 2048  # conversations that are packed together; a larger window fills little more


def measure_lengths(dataset: Dataset, processor: VisualChatProcessor, num_proc: int | None = None) -> Dataset:
    """
    Adds what a batch of conversations costs, by which they can be packed, or grouped (`train_sampling_strategy:
    group_by_length` of `TrainingArguments`). No image is opened; a second call finds what the first has kept.

    Args:
        dataset (`datasets.Dataset`): Of examples with `messages`, a conversation or its JSON text.
        processor (`VisualChatProcessor`): That of the model.
        num_proc (`int`, *optional*): Processes that measure.

    Returns:
        The data set with the columns `length` (tokens, those of images included), `num_images` and `num_rounds`.
    """
    key = digest_of(f"{dataset._fingerprint} {_describe(processor)} lengths 2".encode())
    Path(config.HF_DATASETS_CACHE).mkdir(parents=True, exist_ok=True)

    def measure(example: dict) -> dict[str, int]:
        messages = example["messages"]
        messages = json.loads(messages) if isinstance(messages, str) else messages
        try:
            length = count_tokens(messages, processor)
        except ValueError as error:
            raise ValueError(f"{example.get('where', 'A conversation')} cannot be rendered: {error}") from error
        return {
            "length": length,
            "num_images": sum(is_image(block) for message in messages for block in message["content"]),
            "num_rounds": sum(message["role"] == "assistant" for message in messages),
        }

    measured = dataset.map(
        measure,
        remove_columns=dataset.column_names,
        num_proc=num_proc,
        cache_file_name=str(Path(config.HF_DATASETS_CACHE) / f"visualchat-lengths-{key}.arrow"),
        new_fingerprint=key,
        desc="Measuring conversations",
    ).with_format(None)
    form = dataset.format
    plain = dataset.with_format(None)
    for name in MEASURES:
        values = measured[name][:] if name in measured.column_names else []  # of no example there is no column
        if name in plain.column_names:
            plain = plain.remove_columns(name)
        plain = plain.add_column(name, np.asarray(values, dtype=np.int64))
    if form["type"] is None:
        return plain
    columns = [name for name in form["columns"] if name not in MEASURES]
    return plain.with_format(form["type"], columns, form["output_all_columns"], **form["format_kwargs"])


def pack_conversations(dataset: Dataset, max_length: int, max_images: int | None = None, seed: int = 0) -> Dataset:
    """
    Packs conversations.

    Args:
        dataset (`datasets.Dataset`): As [`measure_lengths`] returns it.
        max_length (`int`): The most tokens of a pack. A conversation that has more is a pack of its own, and what
            becomes of it is the collator's choice.
        max_images (`int`, *optional*): The most images of a pack.
        seed (`int`, *optional*, defaults to 0): Which conversations come together.

    Returns:
        A `datasets.Dataset` of examples with `pack`, a list of examples, for [`DataCollatorForVisualChat`], and with
        the columns `length` and `num_images`.

    Raises:
        `ValueError`: a data set that was not measured, or is empty; or a limit below 1.
    """
    if missing := {"length", "num_images"} - set(dataset.column_names):
        raise ValueError(f"The data set has no column {', '.join(sorted(missing))}; pass it to measure_lengths first.")
    lengths, num_images = (np.asarray(dataset.with_format(None)[name][:]) for name in ("length", "num_images"))
    _check_limits(max_length, max_images)
    if len(lengths) == 0:
        raise ValueError("There is no conversation to pack.")
    limits = {"max_length": max_length, "max_images": max_images, "seed": seed}
    options = {"lengths": np.stack([lengths, num_images]), **limits, "code": Path(__file__).read_text()}
    packs = Dataset.from_generator(_generate_packs, features=PACKS, gen_kwargs=options)
    return packs.with_transform(ReadPacks(dataset), columns=["members"], output_all_columns=True)


PACKS = Features({"members": List(Value("int64")), "length": Value("int64"), "num_images": Value("int64")})


def _generate_packs(lengths: np.ndarray, max_length: int, max_images: int | None, seed: int, code: str):
    sizes, num_images = lengths
    for pack in plan_packs(sizes, num_images, max_length, max_images, seed):
        yield {"members": pack, "length": int(sizes[pack].sum()), "num_images": int(num_images[pack].sum())}


@dataclass
class ReadPacks:
    """Packs of examples, from their numbers; a transform of `datasets`."""

    dataset: Dataset

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        return {"pack": [[self.dataset[number] for number in members] for members in batch["members"]]}


def plan_packs(
    lengths: Sequence[int] | np.ndarray,
    num_images: Sequence[int] | np.ndarray,
    max_length: int,
    max_images: int | None = None,
    seed: int = 0,
) -> list[list[int]]:
    """
    Which conversations go together; each is in one pack exactly.

    Args:
        lengths (`Sequence` of N `int`): Tokens of each conversation.
        num_images (`Sequence` of N `int`): Images of each.
        max_length (`int`): The most tokens of a pack.
        max_images (`int`, *optional*): The most images of a pack.
        seed (`int`, *optional*, defaults to 0): Shuffles them first.

    Raises:
        `ValueError`: a limit below 1.
    """
    most = _check_limits(max_length, max_images)
    sizes = np.stack([np.asarray(lengths, dtype=np.int64), np.asarray(num_images, dtype=np.int64)], axis=1)
    order = list(range(len(sizes)))
    random.Random(seed).shuffle(order)
    packs = []
    for start in range(0, len(order), WINDOW):
        window = np.array(order[start : start + WINDOW])
        packs += [window[members].tolist() for members in _plan_window(sizes[window], most)]
    return packs


def _check_limits(max_length: int, max_images: int | None) -> np.ndarray:
    most = np.array([max_length, np.inf if max_images is None else max_images])
    if max_length > LONGEST:
        raise ValueError(f"A pack of {max_length} tokens has no end; set max_length, as the tokenizer has no limit.")
    if most.min() < 1:
        raise ValueError(f"A pack holds at least 1 token and 1 image, got {max_length} and {max_images}.")
    return most


def _plan_window(sizes: np.ndarray, most: np.ndarray) -> list[list[int]]:
    """Packs of the conversations of one window, (N, 2) tokens and images."""
    fits_alone = (sizes <= most).all(axis=1)
    total = sizes[fits_alone].sum(axis=0)
    num_packs = int(np.ceil((total / most).max()))
    share = np.maximum(total / max(num_packs, 1), 1)  # of each pack, if all were alike
    loads = np.zeros((num_packs, 2), dtype=np.int64)
    members: list[list[int]] = [[] for _ in range(num_packs)]
    for index in np.argsort(-(sizes / share).max(axis=1), kind="stable"):
        after = loads + sizes[index]
        fits = (after <= most).all(axis=1)
        if not fits.any():  # as of one that is too large by itself
            members.append([int(index)])
            loads = np.concatenate([loads, sizes[index][None]])
            continue
        pack = int(np.where(fits, (after / share).max(axis=1), np.inf).argmin())
        members[pack].append(int(index))
        loads[pack] += sizes[index]
    return [pack for pack in members if pack]


@dataclass(frozen=True)
class Waste:
    """
    What a way of batching costs beyond the conversations themselves.

    Args:
        padding (`float`): The share of the tokens of all batches that are padding.
        token_spread, image_spread (`float`): Standard deviation over mean of the tokens (padding included) and of the
            images of a batch, that is, how unequal the work of ranks is.
        batches (`int`): How many there are.
    """

    padding: float
    token_spread: float
    image_spread: float
    batches: int


def compare_batching(
    lengths: Sequence[int], num_images: Sequence[int], max_length: int, batch_size: int = 8, seed: int = 0
) -> dict[str, Waste]:
    """
    What is lost by batches drawn at random, grouped by length, and packed.

    Args:
        lengths, num_images (`Sequence` of `int`): Of each conversation.
        max_length (`int`): The most tokens of a pack.
        batch_size (`int`, *optional*, defaults to 8): Conversations of a padded batch.
        seed (`int`, *optional*, defaults to 0): Of all three.

    Returns:
        For each way what is lost; nothing if there is no conversation. Longer ones count as shortened to `max_length`.
    """
    from transformers.trainer_pt_utils import get_length_grouped_indices

    sizes, images = np.minimum(np.asarray(lengths), max_length), np.asarray(num_images)
    if len(sizes) == 0:
        return {}
    order = list(range(len(sizes)))
    random.Random(seed).shuffle(order)
    generator = torch.Generator().manual_seed(seed)
    grouped = get_length_grouped_indices(sizes.tolist(), batch_size, generator=generator)
    ways = {
        name: [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
        for name, indices in (("random order, padded", order), ("grouped by length, padded", grouped))
    }
    waste = {}
    for name, batches in ways.items():
        computed = np.array([len(batch) * sizes[batch].max() for batch in batches])
        waste[name] = _waste(computed, batches, sizes, images)
    packs = plan_packs(sizes, images, max_length, seed=seed)
    waste["packed"] = _waste(np.array([sizes[pack].sum() for pack in packs]), packs, sizes, images)
    return waste


def batching_table(batching: dict[str, Waste]) -> list[Sequence]:
    """What padding and unequal batches cost, as [`compare_batching`] finds it."""
    rows: list[Sequence] = [("batches", "number", "padding", "spread of tokens", "spread of images")]
    for way, waste in batching.items():
        spreads = (f"{waste.token_spread:.1%}", f"{waste.image_spread:.1%}")
        rows.append((way, waste.batches, f"{waste.padding:.1%}", *spreads))
    return rows


def _waste(computed: np.ndarray, batches: list[list[int]], sizes: np.ndarray, images: np.ndarray) -> Waste:
    images = np.array([images[batch].sum() for batch in batches])
    return Waste(
        padding=1 - sizes.sum() / max(computed.sum(), 1),
        token_spread=computed.std() / max(computed.mean(), 1),
        image_spread=images.std() / max(images.mean(), 1e-9),
        batches=len(batches),
    )


def _describe(processor: VisualChatProcessor) -> str:
    """What the lengths of conversations depend on."""
    tokenizer: Any = processor.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        described = tokenizer.get_vocab()
    else:
        described = {key: value for key, value in json.loads(backend.to_str()).items() if key not in STATE}
    return json.dumps([described, processor.chat_template, processor.image_seq_length, processor.image_token])


STATE = ("padding", "truncation")  # of a tokenizer, left by its last call
