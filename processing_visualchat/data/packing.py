"""
Packing: conversations that share a row, balanced over tokens and images.

    dataset = measure_lengths(mixture.train, processor)
    packs = pack_conversations(dataset, max_length=4096)
    Trainer(…, train_dataset=packs, data_collator=DataCollatorForVisualChat(processor, packing=True))

Tokens cost time in the decoder and images in the vision tower, so both are balanced: conversations, the largest first,
go where they leave the smaller load (longest processing time first, in two dimensions).
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from datasets import Dataset, Features, IterableDataset, List, Value

from ..processing_visualchat import VisualChatProcessor
from .files import cache_rows
from .lengths import measure
from .tables import Row


MAX_PACK_LENGTH = 10**9  # tokens; a tokenizer without a limit states more
WINDOW = 2048  # conversations packed together; a larger window saves little more
STREAM_WINDOW = 256  # the same in a stream, whose images are in memory


def pack_conversations(dataset: Dataset, max_length: int, max_images: int | None = None, seed: int = 0) -> Dataset:
    """
    Packs conversations.

    Args:
        dataset (`datasets.Dataset`): As [`measure_lengths`] returns it.
        max_length (`int`): Maximum tokens of a pack. An over-length conversation is a pack of its own.
        max_images (`int`, *optional*): Maximum images of a pack.
        seed (`int`, *optional*, defaults to 0): The seed of the assignment.

    Returns:
        A `datasets.Dataset` for [`DataCollatorForVisualChat`]: `pack`, a list of examples, `length` and `num_images`.

    Raises:
        `ValueError`: a dataset that was not measured, or is empty; or a limit below 1.
    """
    if missing := {"length", "num_images"} - set(dataset.column_names):
        raise ValueError(f"The dataset has no column {', '.join(sorted(missing))}; pass it to measure_lengths first.")
    lengths, num_images = (np.asarray(dataset.with_format(None)[name][:]) for name in ("length", "num_images"))
    if len(lengths) == 0:
        raise ValueError("There is no conversation to pack.")
    sizes = np.stack([lengths, num_images])
    options = {"sizes": sizes, "max_length": max_length, "max_images": max_images, "seed": seed}
    packs = cache_rows(_generate_packs, PACKS, options)
    return packs.with_transform(partial(_read_packs, dataset), columns=["members"], output_all_columns=True)


PACKS = Features({"members": List(Value("int64")), "length": Value("int64"), "num_images": Value("int64")})


def _generate_packs(sizes: np.ndarray, max_length: int, max_images: int | None, seed: int) -> Iterator[dict]:
    lengths, num_images = sizes
    for pack in plan_packs(lengths, num_images, max_length, max_images, seed):
        yield {"members": pack, "length": int(lengths[pack].sum()), "num_images": int(num_images[pack].sum())}


def _read_packs(dataset: Dataset, batch: dict[str, list]) -> dict[str, list]:
    return {"pack": [[dataset[number] for number in members] for members in batch["members"]]}


def pack_stream(
    stream: IterableDataset,
    processor: VisualChatProcessor,
    max_length: int,
    max_images: int | None = None,
    seed: int = 0,
) -> IterableDataset:
    """Packs the conversations of a stream as they come, [`STREAM_WINDOW`] together; see [`pack_conversations`]."""
    plan = partial(plan_packs, max_length=max_length, max_images=max_images, seed=seed)
    pack = partial(_pack_window, processor=processor, plan=plan)
    return stream.map(pack, batched=True, batch_size=STREAM_WINDOW, remove_columns=stream.column_names)


def _pack_window(batch: dict[str, list], processor: VisualChatProcessor, plan: Callable) -> dict[str, list]:
    examples = [dict(zip(batch, values)) for values in zip(*batch.values())]
    measures = [measure(example, processor) for example in examples]
    packs = plan([found["length"] for found in measures], [found["num_images"] for found in measures])
    return {"pack": [[examples[number] for number in members] for members in packs]}


def plan_packs(
    lengths: Sequence[int] | np.ndarray,
    num_images: Sequence[int] | np.ndarray,
    max_length: int,
    max_images: int | None = None,
    seed: int = 0,
) -> list[list[int]]:
    """Assigns every conversation to exactly one pack, by its tokens and images, see [`pack_conversations`]."""
    limits = np.array([max_length, np.inf if max_images is None else max_images])
    if max_length > MAX_PACK_LENGTH:
        raise ValueError(f"A pack of {max_length} tokens is unlimited; set max_length, as the tokenizer has no limit.")
    if limits.min() < 1:
        raise ValueError(f"A pack holds at least 1 token and 1 image, got {max_length} and {max_images}.")
    sizes = np.stack([np.asarray(lengths, dtype=np.int64), np.asarray(num_images, dtype=np.int64)], axis=1)
    order = list(range(len(sizes)))
    random.Random(seed).shuffle(order)
    packs = []
    for window in map(np.array, _cut(order, WINDOW)):
        packs += [window[members].tolist() for members in _plan_window(sizes[window], limits)]
    return packs


def _plan_window(sizes: np.ndarray, limits: np.ndarray) -> list[list[int]]:
    """Packs of the conversations of one window, (N, 2) tokens and images."""
    fits_alone = (sizes <= limits).all(axis=1)
    total = sizes[fits_alone].sum(axis=0)
    num_packs = int(np.ceil((total / limits).max()))
    share = np.maximum(total / max(num_packs, 1), 1)  # of each pack, if all were equal
    loads = np.zeros((num_packs, 2), dtype=np.int64)
    members: list[list[int]] = [[] for _ in range(num_packs)]
    for index in np.argsort(-(sizes / share).max(axis=1), kind="stable"):
        after = loads + sizes[index]
        fits = (after <= limits).all(axis=1)
        if not fits.any():  # an over-length conversation
            members.append([int(index)])
            loads = np.concatenate([loads, sizes[index][None]])
            continue
        pack = int(np.where(fits, (after / share).max(axis=1), np.inf).argmin())
        members[pack].append(int(index))
        loads[pack] += sizes[index]
    return [pack for pack in members if pack]


@dataclass(frozen=True)
class BatchingStatistics:
    """The cost of a batching strategy beyond the conversations themselves."""

    padding: float  # share of the tokens of all batches
    token_spread: float  # including padding; standard deviation over mean of a batch, the imbalance between ranks
    image_spread: float
    batches: int  # their number


def compare_batching(
    lengths: Sequence[int], num_images: Sequence[int], max_length: int, batch_size: int = 8, seed: int = 0
) -> dict[str, BatchingStatistics]:
    """
    Compares padded batches of `batch_size` in random order or grouped by length, and packs of `max_length` tokens.
    Over-length conversations count as `max_length`; without conversations, there is nothing to compare.
    """
    from transformers.trainer_pt_utils import get_length_grouped_indices

    sizes, images = np.minimum(np.asarray(lengths), max_length), np.asarray(num_images)
    if len(sizes) == 0:
        return {}
    order = list(range(len(sizes)))
    random.Random(seed).shuffle(order)
    generator = torch.Generator().manual_seed(seed)
    grouped = get_length_grouped_indices(sizes.tolist(), batch_size, generator=generator)
    batches = {"random order, padded": _cut(order, batch_size), "grouped by length, padded": _cut(grouped, batch_size)}
    computed = {name: [len(batch) * sizes[batch].max() for batch in members] for name, members in batches.items()}
    batches["packed"] = plan_packs(sizes, images, max_length, seed=seed)
    computed["packed"] = [sizes[pack].sum() for pack in batches["packed"]]
    statistics = {}
    for name, members in batches.items():
        num_tokens, shown = np.array(computed[name]), np.array([images[batch].sum() for batch in members])
        statistics[name] = BatchingStatistics(
            padding=1 - sizes.sum() / max(num_tokens.sum(), 1),
            token_spread=num_tokens.std() / max(num_tokens.mean(), 1),
            image_spread=shown.std() / max(shown.mean(), 1e-9),
            batches=len(members),
        )
    return statistics


def _cut(indices: list[int], size: int) -> list[list[int]]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def batching_table(batching: dict[str, BatchingStatistics]) -> list[Row]:
    """The results of [`compare_batching`] as rows of a table."""
    rows: list[Row] = [("batches", "number", "padding", "spread of tokens", "spread of images")]
    for strategy, found in batching.items():
        spreads = (f"{found.token_spread:.1%}", f"{found.image_spread:.1%}")
        rows.append((strategy, found.batches, f"{found.padding:.1%}", *spreads))
    return rows
