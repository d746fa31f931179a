"""
The split of conversations into training and evaluation by image: no image is on both sides.

Conversations that share an image, directly or through others, form a connected group. Small groups stay whole. A group
larger than the evaluation share is cut, and the conversations with images on both sides are dropped:

    images          a ─ b ─ c ─ d ─ e        a line is a conversation about two images
    sides           E   E   T   T   T
    conversations     E   ✗   T   T          ✗ straddles the cut
"""

import random
from collections import Counter
from collections.abc import Sequence

from .partition import TOLERANCE, Partition


DROP_REASONS = {
    "straddling": "its images are on both sides of the split",
    "surplus": "its source has enough conversations on its side of the split",
}
MIN_TARGET = 2.5  # conversations; around a smaller target, the promised range can be without a whole number


def split_by_image(images: Sequence[Sequence[str]], sources: Sequence[str], share: float, seed: int = 0) -> list[str]:
    """
    Assigns conversations to training or evaluation, so that no image is on both sides.

    Args:
        images (`Sequence` of `Sequence` of `str`): The images of each conversation, none for a text-only one.
        sources (`Sequence` of `str`): The source of each conversation.
        share (`float`): The wanted evaluation share of each source's conversations, from 0 to below 1. The share of
            what is kept is within a fifth of it where the images permit that. Best effort are sources with fewer than
            `MIN_TARGET / share` conversations, sources whose whole groups do not add up to it, and sources that
            depend on a few images.
        seed (`int`, *optional*, defaults to 0): The seed of all random choices.

    Returns:
        `list[str]`: For each conversation `"train"`, `"evaluation"`, or a key of `DROP_REASONS`. Without a group
        larger than the share, none is dropped. No source is dropped as a whole.

    Raises:
        `ValueError`: `share` is out of range, or `images` and `sources` differ in length.
    """
    if not 0 <= share < 1:
        raise ValueError(f"The evaluation share is {share!r}; use a share from 0 to below 1.")
    if len(images) != len(sources):
        raise ValueError(f"There are {len(images)} conversations and {len(sources)} sources; name one for each.")
    if share == 0:
        return ["train"] * len(images)
    if share > 0.5:  # the smaller side is grown
        other = {"train": "evaluation", "evaluation": "train"}
        return [other.get(side, side) for side in split_by_image(images, sources, 1 - share, seed)]
    rng = random.Random(seed)
    names = {name: number for number, name in enumerate(dict.fromkeys(sources))}
    source_numbers = [names[name] for name in sources]
    sizes = Counter(source_numbers)
    targets = [share * sizes[number] for number in range(len(names))]
    units, is_cut = _find_units(images, source_numbers, targets)
    in_cut_groups = {source for source, flag in zip(source_numbers, is_cut) if flag}
    is_balanced = [source in in_cut_groups and target >= MIN_TARGET for source, target in enumerate(targets)]
    partition = Partition(units, source_numbers, share, is_balanced)
    partition.grow_regions(rng)
    partition.refine()
    return partition.assign_sides(rng)


def _find_units(
    images: Sequence[Sequence[str]], sources: list[int], targets: list[float]
) -> tuple[list[tuple[int, ...]], list[bool]]:
    """The units of each conversation, and whether it is of a group that may be cut: larger than a source's target."""
    parents: list[int] = []
    numbers: dict[str, int] = {}

    def find_root(number: int) -> int:
        while parents[number] != number:
            parents[number] = parents[parents[number]]
            number = parents[number]
        return number

    rows = []
    for names in images:
        for name in names:
            if numbers.setdefault(name, len(parents)) == len(parents):
                parents.append(len(parents))
        row = sorted({numbers[name] for name in names}) or [len(parents)]
        if not names:
            parents.append(len(parents))
        for number in row[1:]:
            parents[find_root(number)] = find_root(row[0])
        rows.append(row)
    roots = [find_root(row[0]) for row in rows]
    sizes = Counter(zip(roots, sources))
    large = {
        root
        for (root, source), size in sizes.items()
        if targets[source] >= MIN_TARGET and size > targets[source] * (1 + TOLERANCE)
    }
    is_cut = [root in large for root in roots]
    compact: dict[int, int] = {}
    units = [
        tuple(compact.setdefault(number, len(compact)) for number in (row if flag else [root]))
        for row, root, flag in zip(rows, roots, is_cut)
    ]
    return units, is_cut
