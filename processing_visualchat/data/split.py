"""
The split of conversations into training and evaluation by image: no image is on both sides.

Conversations that share an image, directly or through others, form a connected group. Small groups stay whole. METIS
(Karypis and Kumar, 1998) cuts a group larger than the evaluation share into blocks of images with few conversations
between them. A local search then chooses the blocks for evaluation, and conversations with images on both sides are
dropped:

    blocks          a ─ b │ c ─ d │ e        a line is a conversation about two images
    sides           E   E   T   T   T
    conversations     E   ✗   T   T          ✗ straddles the cut
"""

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pymetis
from networkx.utils import UnionFind


DROP_REASONS = {
    "straddling": "its images are on both sides of the split",
    "surplus": "its source has enough conversations on its side of the split",
}
TOLERANCE = 0.15  # of the share; leaves room for rounding below the promised 0.2
MIN_TARGET = 2.5  # conversations; around a smaller target, the promised range can be without a whole number
NUM_BLOCKS = 32  # for evaluation; more blocks represent a source better and drop more conversations
MIN_BLOCK = 40  # conversations; smaller blocks are mostly boundary
MAX_PASSES = 20  # of the local search

Blocks = tuple[int, ...]  # those that contain the images of a conversation
Conversations = list[tuple[list[int], str]]  # the numbers of their images, and their sources


def split_by_image(images: Sequence[Sequence[str]], sources: Sequence[str], share: float, seed: int = 0) -> list[str]:
    """
    Assigns conversations to training or evaluation by their images, none for a text-only one.

    Of each source, `share` of what is kept is for evaluation, within a fifth of it where the images permit that. Best
    effort are sources with fewer than `MIN_TARGET / share` conversations, sources whose whole groups do not add up to
    it, and sources that depend on a few images.

    Returns `"train"`, `"evaluation"`, or a key of `DROP_REASONS` for each conversation. Without a group larger than
    the share, none is dropped. No source is dropped as a whole.
    """
    if not 0 <= share < 1:
        raise ValueError(f"The evaluation share is {share!r}; use a share from 0 to below 1.")
    if len(images) != len(sources):
        raise ValueError(f"There are {len(images)} conversations and {len(sources)} sources; name one for each.")
    if share == 0:
        return ["train"] * len(images)
    if share > 0.5:  # the smaller side is chosen
        other = {"train": "evaluation", "evaluation": "train"}
        return [other.get(side, side) for side in split_by_image(images, sources, 1 - share, seed)]
    rng = random.Random(seed)
    targets = {source: share * size for source, size in Counter(sources).items()}
    rows, cut_sources = _find_blocks(images, sources, targets, seed)
    chosen = _choose_blocks(rows, sources, share, rng)
    sides = [_side_of(row, chosen) for row in rows]
    num_train = Counter(source for source, side in zip(sources, sides) if side == "train")
    evaluation = defaultdict(list)
    for index, (source, side) in enumerate(zip(sources, sides)):
        if side == "evaluation" and source in cut_sources:
            evaluation[source].append(index)
    highest = share * (1 + TOLERANCE)
    for source, indices in evaluation.items():
        most = int(num_train[source] * highest / (1 - highest))
        if MIN_TARGET < most < len(indices):
            for index in rng.sample(indices, len(indices) - most):
                sides[index] = "surplus"
    return sides


def _find_blocks(
    images: Sequence[Sequence[str]], sources: Sequence[str], targets: dict[str, float], seed: int
) -> tuple[list[Blocks], set[str]]:
    """The blocks of each conversation, and the sources of the groups that were cut."""
    numbers: dict[str, int] = {}
    named = [[numbers.setdefault(name, len(numbers)) for name in dict.fromkeys(names)] for names in images]
    rows = [row or [len(numbers) + index] for index, row in enumerate(named)]  # text only: an image of its own
    connected = UnionFind(image for row in rows for image in row)
    for row in rows:
        connected.union(*row)
    groups = defaultdict(list)
    for row, source in zip(rows, sources):
        groups[connected[row[0]]].append((row, source))
    blocks: list[list[int]] = []
    cut_sources: set[str] = set()
    for group in groups.values():
        members = list(dict.fromkeys(image for row, _ in group for image in row))
        counts = Counter(source for _, source in group)
        if all(count <= _get_limit(targets[source]) for source, count in counts.items()):
            blocks.append(members)
        else:
            blocks += _cut(members, group, targets, seed)
            cut_sources.update(counts)
    block_of = {image: number for number, block in enumerate(blocks) for image in block}
    return [tuple(sorted({block_of[image] for image in row})) for row in rows], cut_sources


def _get_limit(target: float) -> float:
    """Maximum evaluation conversations of a source."""
    return max(target, MIN_TARGET) * (1 + TOLERANCE)


def _cut(images: list[int], group: Conversations, targets: dict[str, float], seed: int) -> list[list[int]]:
    """Blocks of images that are small for every source, with few conversations between them."""
    num_blocks = 1
    for source, count in Counter(source for _, source in group).items():
        if (target := targets[source]) >= MIN_TARGET:
            block_size = max(target / NUM_BLOCKS, min(target / 2, MIN_BLOCK))
            num_blocks = max(num_blocks, int(count / block_size))
    if num_blocks == 1 or len(images) == 1:
        return [images]
    vertices = {image: vertex for vertex, image in enumerate(images)}
    pairs = [(vertices[a], vertices[b]) for row, _ in group for a, b in pairwise(row)]
    both_ways = np.array([*pairs, *((b, a) for a, b in pairs)], dtype=int).reshape(-1, 2)
    edges, weights = np.unique(both_ways @ [len(images), 1], return_counts=True)  # as one number: much faster
    heads, tails = np.divmod(edges, len(images))
    starts = np.searchsorted(heads, np.arange(len(images) + 1))
    _, part_of = pymetis.part_graph(
        min(num_blocks, 1 + len(images) // 2),
        pymetis.CSRAdjacency(starts, tails),
        eweights=weights,
        recursive=True,
        options=pymetis.Options(seed=seed),
    )
    parts: dict[int, tuple[list[int], Conversations]] = {part: ([], []) for part in part_of}
    if len(parts) == 1:
        return [images]
    for image, part in zip(images, part_of):
        parts[part][0].append(image)
    for row, source in group:
        part = part_of[vertices[row[0]]]
        parts[part][1].append(([image for image in row if part_of[vertices[image]] == part], source))
    # A source that is concentrated on a few images has them cut again.
    return [block for part in parts.values() for block in _cut(*part, targets, seed)]


def _side_of(blocks: Blocks, chosen: set[int]) -> str:
    num_chosen = sum(block in chosen for block in blocks)
    return "straddling" if 0 < num_chosen < len(blocks) else "evaluation" if num_chosen else "train"


def _choose_blocks(rows: list[Blocks], sources: Sequence[str], share: float, rng: random.Random) -> set[int]:
    """The blocks for evaluation: in random order, each changes sides where that brings sources closer to the share."""
    sizes = Counter(sources)
    kept = Counter((source, "train") for source in sources)
    about: dict[int, Counter] = defaultdict(Counter)  # the conversations about each block, equal ones counted
    dependent: Counter = Counter()
    for row, source in zip(rows, sources):
        for block in row:
            about[block][row, source] += 1
            dependent[block, source] += 1
    # A block with a common image stays in training: more conversations depend on it than evaluation may have.
    fixed = {block for (block, source), count in dependent.items() if count > _get_limit(share * sizes[source])}
    movable = [block for block in about if block not in fixed]
    chosen: set[int] = set()

    def find_cost(source: str) -> float:
        """The squared relative deviation from the share, and the dropped part of all conversations."""
        train, evaluation = kept[source, "train"], kept[source, "evaluation"]
        if train + evaluation == 0:
            return float("inf")
        target = share * (train + evaluation)
        deviation = (evaluation - target) / max(target, MIN_TARGET)
        return deviation**2 + (sizes[source] - train - evaluation) / len(rows)

    def move(block: int) -> None:
        for (row, source), count in about[block].items():
            kept[source, _side_of(row, chosen)] -= count
        chosen.symmetric_difference_update([block])
        for (row, source), count in about[block].items():
            kept[source, _side_of(row, chosen)] += count

    for _ in range(MAX_PASSES):
        before = set(chosen)
        for block in rng.sample(movable, len(movable)):
            affected = {source for _, source in about[block]}
            cost = sum(map(find_cost, affected))
            move(block)
            if sum(map(find_cost, affected)) > cost - 1e-9:
                move(block)
        if chosen == before:
            break
    return chosen
