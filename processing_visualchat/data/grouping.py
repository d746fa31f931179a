"""
Grouping by image: conversations about the same images come into one row or batch, which computes equal images once.

    conversations, with their images     a1  a2  ab3  b4  c5  a6
    in random order                      a6  c5  b4  a1  ab3  a2
    groups of up to 3 conversations      [a6 a1 ab3]  [c5]  [b4]  [a2]

Each conversation takes along the next ones that share an image with it. A conversation without images is a group of
its own. All that is random follows from a seed, so that every process finds the same order.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from itertools import chain

import datasets
import numpy as np
import torch


Images = Counter[str]  # the different images of an example by their digests, each with its number of conversations


class ImageGroupedDataset(torch.utils.data.Dataset):
    """
    Examples in a random order, another one in every epoch, that brings those about the same images into one batch.

    It is read in sequence, with `train_sampling_strategy="sequential"` of `TrainingArguments`. Trainer sets the epoch,
    also that of a resumed run.

    Args:
        dataset (`datasets.Dataset`): Conversations, or packs of them, with the column `digests`.
        batch_size (`int`): Examples in a batch of one process.
        num_batches (`int`, *optional*, defaults to 1): Batches in an optimizer step, of all processes together.
        max_per_image (`int`, *optional*): Maximum conversations about an image in an optimizer step.
        seed (`int`, *optional*, defaults to 0): The seed of the order.

    Raises:
        `ValueError`: a dataset without digests, or `max_per_image` is too low for it.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        batch_size: int,
        num_batches: int = 1,
        max_per_image: int | None = None,
        seed: int = 0,
    ):
        self.dataset, self.batch_size, self.step_size = dataset, batch_size, batch_size * num_batches
        self.max_per_image, self.seed, self.epoch = max_per_image, seed, -1
        self.images = [Counter(digests) for digests in read_digests(dataset)]
        # In shared memory: data loader workers may outlive an epoch.
        self._order = torch.empty(len(dataset), dtype=torch.int64).share_memory_()
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Puts the examples in the order of an epoch."""
        if epoch != self.epoch:
            rng = random.Random(f"{self.seed} {epoch}")
            order = order_by_image(self.images, self.batch_size, self.step_size, self.max_per_image, rng)
            self._order.copy_(torch.tensor(order))
            self.epoch = epoch

    @property
    def order(self) -> list[int]:
        """The numbers of the examples in the order of the epoch."""
        return self._order.tolist()

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> dict:
        return self.dataset[int(self._order[index])]


def read_digests(dataset: datasets.Dataset) -> list[list[str]]:
    """The column `digests`: of each example the different images of each of its conversations."""
    if "digests" not in dataset.column_names:
        raise ValueError("The dataset has no column digests; load it by load_mixture or load_conversations.")
    return dataset.with_format(None)["digests"][:]


def count_repeats(images: Iterable[Collection[str]]) -> int:
    """Of examples in one batch, the images that are equal to another one, and not computed again."""
    shown = Counter(chain.from_iterable(images))
    return shown.total() - len(shown)


def find_groups(
    images: Sequence[Images],
    sizes: np.ndarray,
    limits: np.ndarray,
    saving: np.ndarray | int,
    max_per_image: int | None,
    rng: random.Random,
) -> list[list[int]]:
    """
    Groups of examples that share images, in random order; each example is in one of them.

    Args:
        images (`Sequence` of N `Counter`): The images of each example.
        sizes (`np.ndarray` of shape `(N, D)`): What each example takes of a row or batch.
        limits (`np.ndarray` of shape `(D,)`): Maximum size of a group; a larger example is a group of its own.
        saving (`np.ndarray` of shape `(D,)` or `int`): What an image takes less where the group has it already.
        max_per_image (`int`, *optional*): Maximum conversations about an image in a group.
        rng (`random.Random`): The source of randomness.
    """
    order = rng.sample(range(len(images)), len(images))
    about: dict[str, list[int]] = defaultdict(list)  # the examples about each image, the next one last
    for index in reversed(order):
        for image in images[index]:
            about[image].append(index)
    groups, placed = [], set()
    for first in order:
        if first in placed:
            continue
        placed.add(first)
        group, size, shown = [first], sizes[first], Counter(images[first])
        for image in images[first]:
            while about[image]:
                index = about[image][-1]
                if index not in placed:
                    larger = size + sizes[index] - saving * sum(other in shown for other in images[index])
                    if (larger > limits).any() or not _has_room(shown, images[index], max_per_image):
                        break
                    placed.add(index)
                    group.append(index)
                    size = larger
                    shown.update(images[index])
                about[image].pop()
        groups.append(group)
    rng.shuffle(groups)  # large ones are found first
    return groups


def order_by_image(
    images: Sequence[Images], batch_size: int, step_size: int, max_per_image: int | None, rng: random.Random
) -> list[int]:
    """
    A random order whose slices of `batch_size` examples, the batches, show few different images, and whose slices of
    `step_size` at most `max_per_image` conversations about each.
    """
    sizes, limits = np.ones((len(images), 1), dtype=np.int64), np.array([batch_size])
    batches = _fill_batches(find_groups(images, sizes, limits, 0, max_per_image, rng), batch_size)
    last = [] if not batches or len(batches[-1]) == batch_size else batches.pop()
    rng.shuffle(batches)
    order = [*chain.from_iterable(batches), *last]
    if max_per_image is not None:
        _spread_images(order, images, step_size, max_per_image, rng)
    return order


def _fill_batches(groups: Iterable[list[int]], batch_size: int) -> list[list[int]]:
    """Full batches, but for the last one; next comes the largest group that fits, or a part of another."""
    by_size: dict[int, list[list[int]]] = defaultdict(list)
    for group in groups:
        by_size[len(group)].append(group)
    batches = []
    while by_size:
        batch: list[int] = []
        while by_size and len(batch) < batch_size:
            room = batch_size - len(batch)
            size = max((size for size in by_size if size <= room), default=min(by_size))
            group = by_size[size].pop()
            if not by_size[size]:
                del by_size[size]
            batch += group[:room]
            if group[room:]:
                by_size[size - room].append(group[room:])
        batches.append(batch)
    return batches


def _spread_images(
    order: list[int], images: Sequence[Images], step_size: int, max_per_image: int, rng: random.Random
) -> None:
    """Exchanges examples between steps, until none has more than `max_per_image` conversations about an image."""
    steps: list[Images] = [Counter() for _ in range(0, len(order), step_size)]
    for place, index in enumerate(order):
        steps[place // step_size].update(images[index])
    for place, index in enumerate(order):
        step, mine = steps[place // step_size], images[index]
        if all(step[image] <= max_per_image for image in mine):
            continue
        start = rng.randrange(len(order))
        for other in chain(range(start, len(order)), range(start)):
            target, theirs = steps[other // step_size], images[order[other]]
            if (
                target is not step
                and _has_room(target, mine, max_per_image, theirs)
                and _has_room(step, theirs, max_per_image, mine)
            ):
                order[place], order[other] = order[other], index
                for counts, leaving, joining in ((step, mine, theirs), (target, theirs, mine)):
                    counts.subtract(leaving)
                    counts.update(joining)
                break
        else:
            image, count = Counter(chain.from_iterable(each.elements() for each in images)).most_common(1)[0]
            raise ValueError(
                f"At most {max_per_image} conversations about an image in a step are too few: {count} are about the "
                f"image {image}, and an epoch has {len(steps)} steps of {step_size} examples. Raise max_per_image, or "
                "make the steps smaller."
            )


def _has_room(shown: Images, images: Images, max_per_image: int | None, leaving: Images | None = None) -> bool:
    """Whether images can join those that are shown, if some of these leave."""
    if max_per_image is None:
        return True
    leaving = leaving or Counter()
    return all(shown[image] - leaving[image] + count <= max_per_image for image, count in images.items())
