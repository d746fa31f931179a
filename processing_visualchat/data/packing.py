"""
Packing: conversations that share a row, balanced over tokens and images.

    dataset = measure_lengths(mixture.train, processor)
    packs = pack_conversations(dataset, max_length=4096)
    Trainer(…, train_dataset=packs, data_collator=DataCollatorForVisualChat(processor, packing=True))

Tokens cost time in the decoder and images in the vision tower, so both are balanced: conversations, the largest first,
go where they leave the smaller load (longest processing time first, in two dimensions). Grouped by image, those about
the same images go together, see `grouping.py`.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from heapq import heappop, heappush
from itertools import count
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, IterableDataset, List, Value

from ..processing_visualchat import VisualChatProcessor
from .files import cache_rows
from .grouping import count_repeats, find_groups, order_by_image, read_digests
from .lengths import measure
from .tables import Row


MAX_PACK_LENGTH = 10**9  # tokens; a tokenizer without a limit states more
WINDOW = 2048  # conversations packed together; a larger window saves little more
STREAM_WINDOW = 256  # the same in a stream, whose images are in memory


def pack_conversations(
    dataset: Dataset,
    max_length: int,
    max_images: int | None = None,
    seed: int = 0,
    group_by_image: bool = False,
    shared_length: int = 0,
    max_per_image: int | None = None,
) -> Dataset:
    """
    Packs conversations.

    Args:
        dataset (`datasets.Dataset`): As [`measure_lengths`] returns it.
        max_length (`int`): Maximum tokens of a pack. An over-length conversation is a pack of its own.
        max_images (`int`, *optional*): Maximum images of a pack.
        seed (`int`, *optional*, defaults to 0): The seed of the assignment.
        group_by_image (`bool`, *optional*, defaults to `False`): Packs conversations about the same images together.
            Equal images of a pack count once, as they are computed once.
        shared_length (`int`, *optional*, defaults to 0): The tokens of an image that count once with it:
            `image_seq_length` if the decoder computes equal images once ([`supports_image_memory`]), else 0.
        max_per_image (`int`, *optional*): Maximum conversations about an image in a pack.

    Returns:
        A `datasets.Dataset` for [`DataCollatorForVisualChat`]: `pack`, a list of examples, `length` and `num_images`;
        grouped by image also `digests`, of the images of each conversation.

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
    if group_by_image:
        # A list would be divided into shards.
        options |= {"images": tuple(map(tuple, read_digests(dataset)))}
        options |= {"shared_length": shared_length, "max_per_image": max_per_image}
    packs = cache_rows(_generate_packs, GROUPED_PACKS if group_by_image else PACKS, options)
    return packs.with_transform(partial(_read_packs, dataset), columns=["members"], output_all_columns=True)


PACKS = Features({"members": List(Value("int64")), "length": Value("int64"), "num_images": Value("int64")})
GROUPED_PACKS = Features({**PACKS, "digests": List(Value("string"))})


def _generate_packs(sizes: np.ndarray, images: Sequence[Sequence[str]] | None = None, **options) -> Iterator[dict]:
    lengths, num_images = sizes
    for pack in plan_packs(lengths, num_images, images=images, **options):
        row = {"members": pack, "length": int(lengths[pack].sum()), "num_images": int(num_images[pack].sum())}
        yield row if images is None else {**row, "digests": [digest for index in pack for digest in images[index]]}


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
    images: Sequence[Sequence[str]] | None = None,
    shared_length: int = 0,
    max_per_image: int | None = None,
) -> list[list[int]]:
    """
    Assigns every conversation to exactly one pack, by its tokens and images, see [`pack_conversations`]; grouped by
    image if the digests of their images are given.
    """
    limits = np.array([max_length, np.inf if max_images is None else max_images])
    if max_length > MAX_PACK_LENGTH:
        raise ValueError(f"A pack of {max_length} tokens is unlimited; set max_length, as the tokenizer has no limit.")
    if limits.min() < 1:
        raise ValueError(f"A pack holds at least 1 token and 1 image, got {max_length} and {max_images}.")
    sizes = np.stack([np.asarray(lengths, dtype=np.int64), np.asarray(num_images, dtype=np.int64)], axis=1)
    rng = random.Random(seed)
    if images is None:
        order = list(range(len(sizes)))
        rng.shuffle(order)
        groups = [[index] for index in order]
    else:
        saving = np.array([shared_length, 1])
        groups = find_groups([Counter(row) for row in images], sizes, limits, saving, max_per_image, rng)

    def measure_group(group: list[int]) -> np.ndarray:
        size = sizes[group].sum(axis=0)
        return size if images is None else size - saving * count_repeats(images[index] for index in group)

    apart = None if max_per_image is None else images
    return [pack for window in _cut(groups, WINDOW) for pack in _plan_window(window, measure_group, limits, apart)]


def _plan_window(
    groups: list[list[int]],
    measure_group: Callable[[list[int]], np.ndarray],
    limits: np.ndarray,
    apart: Sequence[Sequence[str]] | None,
) -> list[list[int]]:
    """
    Packs of the groups of one window, whose sizes are tokens and images. A large group that fits nowhere is
    divided. With the images of each conversation in `apart`, groups about the same image are in different packs.
    """
    sizes = np.stack([measure_group(group) for group in groups])
    fits_alone = (sizes <= limits).all(axis=1)
    total = sizes[fits_alone].sum(axis=0)
    num_packs = int(np.ceil((total / limits).max()))
    share = np.maximum(total / max(num_packs, 1), 1)  # of each pack, if all were equal
    loads = np.zeros((num_packs, 2), dtype=np.int64)
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    packs_about: dict[str, list[int]] = defaultdict(list)
    waiting: list[tuple] = []  # the largest first

    def add(group: list[int], size: np.ndarray) -> None:
        heappush(waiting, (-(size / share).max(), next(numbers), size, group))

    numbers = count()
    for group, size in zip(groups, sizes):
        add(group, size)
    while waiting:
        *_, size, group = heappop(waiting)
        images = {image for index in group for image in apart[index]} if apart is not None else ()
        after = loads + size
        fits = (after <= limits).all(axis=1)
        fits[[pack for image in images for pack in packs_about[image]]] = False
        if fits.any():
            pack = int(np.where(fits, (after / share).max(axis=1), np.inf).argmin())
            packs[pack] += group
            loads[pack] += size
        elif len(group) > 1 and (2 * size > limits).any():
            for part in (group[: len(group) // 2], group[len(group) // 2 :]):
                add(part, measure_group(part))
            continue
        else:  # an over-length conversation, or what is left when all packs are full
            pack = len(packs)
            packs.append([*group])
            loads = np.concatenate([loads, size[None]])
        for image in images:
            packs_about[image].append(pack)
    return [pack for pack in packs if pack]


@dataclass(frozen=True)
class BatchingStatistics:
    """The cost of a batching strategy beyond the conversations themselves."""

    padding: float  # share of the tokens of all batches
    token_spread: float  # including padding; standard deviation over mean of a batch, the imbalance between ranks
    image_spread: float
    batches: int  # their number
    images_per_conversation: float  # that are computed: equal ones of a batch once


def compare_batching(
    lengths: Sequence[int],
    num_images: Sequence[int],
    max_length: int,
    batch_size: int = 8,
    seed: int = 0,
    images: Sequence[Sequence[str]] | None = None,
    shared_length: int = 0,
) -> dict[str, BatchingStatistics]:
    """
    Compares padded batches of `batch_size` in random order or grouped by length, and packs of `max_length` tokens;
    with the digests of the images of each conversation, also both grouped by image, see [`pack_conversations`].
    Over-length conversations count as `max_length`; without conversations, there is nothing to compare.
    """
    from transformers.trainer_pt_utils import get_length_grouped_indices

    sizes = np.minimum(np.asarray(lengths), max_length)
    if len(sizes) == 0:
        return {}
    order = list(range(len(sizes)))
    random.Random(seed).shuffle(order)
    generator = torch.Generator().manual_seed(seed)
    grouped = get_length_grouped_indices(sizes.tolist(), batch_size, generator=generator)
    padded = {"random order, padded": order, "grouped by length, padded": grouped}
    packed = {"packed": plan_packs(sizes, num_images, max_length, seed=seed)}
    if images is not None:
        counts = [Counter(row) for row in images]
        rng = random.Random(seed)
        padded["grouped by image, padded"] = order_by_image(counts, batch_size, batch_size, None, rng)
        packed["packed, grouped by image"] = plan_packs(
            sizes, num_images, max_length, seed=seed, images=images, shared_length=shared_length
        )
    measure = partial(measure_batches, sizes, np.asarray(num_images), images=images, shared_length=shared_length)
    statistics = {name: measure(_cut(order, batch_size), is_padded=True) for name, order in padded.items()}
    return statistics | {name: measure(packs, is_padded=False) for name, packs in packed.items()}


def measure_batches(
    lengths: np.ndarray,
    num_images: np.ndarray,
    batches: Sequence[list[int]],
    is_padded: bool,
    images: Sequence[Sequence[str]] | None = None,
    shared_length: int = 0,
) -> BatchingStatistics:
    """Batches, as the numbers of their conversations; without the digests of the images, all of them are different."""
    rows = np.array([len(batch) * lengths[batch].max() if is_padded else lengths[batch].sum() for batch in batches])
    repeats = np.zeros(len(batches), dtype=np.int64)
    if images is not None:
        repeats[:] = [count_repeats(images[index] for index in batch) for batch in batches]
    num_tokens = rows - shared_length * repeats
    num_computed = np.array([num_images[batch].sum() for batch in batches]) - repeats
    return BatchingStatistics(
        padding=1 - lengths.sum() / max(rows.sum(), 1),
        token_spread=num_tokens.std() / max(num_tokens.mean(), 1),
        image_spread=num_computed.std() / max(num_computed.mean(), 1e-9),
        batches=len(batches),
        images_per_conversation=num_computed.sum() / len(lengths),
    )


def _cut(indices: list[Any], size: int) -> list[list[Any]]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def batching_table(batching: dict[str, BatchingStatistics]) -> list[Row]:
    """Statistics by strategy, as of [`compare_batching`], as rows of a table."""
    spreads = ("spread of tokens", "spread of images")
    rows: list[Row] = [("batches", "number", "padding", *spreads, "images per conversation")]
    for strategy, found in batching.items():
        shares = (f"{share:.1%}" for share in (found.padding, found.token_spread, found.image_spread))
        rows.append((strategy, found.batches, *shares, f"{found.images_per_conversation:.2f}"))
    return rows
