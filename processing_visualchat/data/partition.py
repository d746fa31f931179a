"""
The partition of a hypergraph into training and evaluation: units are vertices, conversations are edges.

A unit is an image, or a group of images that stays whole. Regions grow from random conversations of the source that is
furthest below its share, as in iterative stratification (Sechidis et al., 2011), unit by unit with the smallest cut
(greedy graph growing; Karypis and Kumar, 1998). Moves of single units then refine the cut (Fiduccia and Mattheyses,
1982), in terms of the number of conversations that can be kept with every share within the tolerance.
"""

import random
from collections import Counter
from collections.abc import Iterable
from heapq import heapify, heappop, heappush


TOLERANCE = 0.15  # of the share; leaves room for rounding below the promised 0.2
NUM_REGIONS = 32  # more regions represent a large group better and drop more conversations
MIN_REGION = 25  # conversations; smaller regions are mostly boundary
MAX_REFUSALS = 100  # regions in a row that bring the shares no closer to their targets
MAX_STALLED = 500  # moves in a row that keep no more conversations
MAX_PASSES = 8
MAX_EDGES = 1000  # of a unit that may move; bounds the time that a move takes


class Partition:
    """
    The sides of all units, and the numbers of conversations that each source keeps. All units start in training.

    Edges are distinct sets of units, with the number of conversations about them by source.

    Args:
        rows (`list` of `tuple` of `int`): The units of each conversation; vertices are numbered from 0.
        sources (`list` of `int`): The source of each conversation, numbered from 0.
        share (`float`): The evaluation share of the conversations of each source, above 0, at most a half.
        is_balanced (`list` of `bool`): For each source, whether its share is worth dropping conversations.
    """

    def __init__(self, rows: list[tuple[int, ...]], sources: list[int], share: float, is_balanced: list[bool]):
        self.rows, self.sources, self.share, self.is_balanced = rows, sources, share, is_balanced
        self.highest_share = share * (1 + TOLERANCE)
        sizes = Counter(sources)
        self.train = [sizes[source] for source in range(len(is_balanced))]
        self.evaluation = [0] * len(is_balanced)
        self.targets = [share * count for count in self.train]
        self.counts: dict[tuple[int, ...], Counter[int]] = {}  # conversations by source, of each edge
        for row, source in zip(rows, sources):
            self.counts.setdefault(row, Counter())[source] += 1
        self.totals = {edge: counts.total() for edge, counts in self.counts.items()}
        self.edges_of: list[list[tuple[int, ...]]] = [[] for _ in range(1 + max(map(max, rows), default=-1))]
        for edge in self.counts:
            for unit in edge:
                self.edges_of[unit].append(edge)
        self.num_held_out = dict.fromkeys(self.counts, 0)  # units of each edge that are in evaluation
        self.is_held_out = [False] * len(self.edges_of)
        self.is_fixed = [self._is_hub(edges) for edges in self.edges_of]

    def _is_hub(self, edges: list[tuple[int, ...]]) -> bool:
        """Whether a unit stays in training, since it joins more conversations of a source than evaluation may have."""
        if len(edges) > MAX_EDGES:
            return True
        joined: Counter[int] = Counter()
        for edge in edges:
            if len(edge) > 1:
                joined.update(self.counts[edge])
        return any(n > self.targets[s] * (1 + TOLERANCE) for s, n in joined.items() if self.is_balanced[s])

    def find_changes(self, unit: int) -> dict[int, tuple[int, int]]:
        """The changes in training and evaluation conversations of each source if the unit changed sides."""
        changes: dict[int, tuple[int, int]] = {}
        step = -1 if self.is_held_out[unit] else 1
        for edge in self.edges_of[unit]:
            before, size = self.num_held_out[edge], len(edge)
            train = (before + step == 0) - (before == 0)
            evaluation = (before + step == size) - (before == size)
            if train or evaluation:
                for source, count in self.counts[edge].items():
                    t, e = changes.get(source, (0, 0))
                    changes[source] = (t + train * count, e + evaluation * count)
        return changes

    def move(self, unit: int) -> None:
        for source, (train, evaluation) in self.find_changes(unit).items():
            self.train[source] += train
            self.evaluation[source] += evaluation
        self.is_held_out[unit] = not self.is_held_out[unit]
        for edge in self.edges_of[unit]:
            self.num_held_out[edge] += 1 if self.is_held_out[unit] else -1

    def find_loss(self, unit: int) -> float:
        """How many conversations fewer are kept if the unit changed sides."""
        loss = 0.0
        for source, (train, evaluation) in self.find_changes(unit).items():
            t, e = self.train[source], self.evaluation[source]
            loss += self._count_kept(source, t, e) - self._count_kept(source, t + train, e + evaluation)
        return loss

    def find_cut_change(self, unit: int) -> int:
        """How many conversations more straddle the cut if the unit changed sides."""
        change = 0
        step = -1 if self.is_held_out[unit] else 1
        for edge in self.edges_of[unit]:
            before, size = self.num_held_out[edge], len(edge)
            change += ((0 < before + step < size) - (0 < before < size)) * self.totals[edge]
        return change

    def _count_kept(self, source: int, train: int, evaluation: int) -> float:
        """The most conversations that can be kept with the evaluation share within the tolerance."""
        if not self.is_balanced[source]:
            return train + evaluation
        lowest, highest = self.share * (1 - TOLERANCE), self.highest_share
        return min(train + evaluation, evaluation / lowest, train / (1 - highest))

    def _find_neighbors(self, unit: int) -> Iterable[int]:
        units = dict.fromkeys(other for edge in self.edges_of[unit] for other in edge)
        return (other for other in units if not self.is_fixed[other])

    def grow_regions(self, rng: random.Random) -> None:
        """Moves regions to evaluation, as long as they bring the sources closer to their targets."""
        size = max(self.share * len(self.rows) / NUM_REGIONS, MIN_REGION)
        seeds: list[list[tuple[int, ...]]] = [[] for _ in self.targets]
        for row, source in zip(self.rows, self.sources):
            seeds[source].append(row)
        for rows in seeds:
            rng.shuffle(rows)
        refusals = [0] * len(seeds)
        while True:
            below = [
                source
                for source, target in enumerate(self.targets)
                if self.evaluation[source] < target and seeds[source] and refusals[source] < MAX_REFUSALS
            ]
            if not below:
                return
            source = min(below, key=lambda source: self.evaluation[source] / self.targets[source])
            row = seeds[source].pop()
            if any(self.is_held_out[unit] or self.is_fixed[unit] for unit in row):
                continue
            before = list(self.evaluation)
            region = self._grow_region(row, source, size)
            # A deviation counts relative to its target, but for tiny sources, which would refuse every region.
            change = sum(
                (abs(after - target) - abs(count - target)) / max(target, size)
                for after, count, target in zip(self.evaluation, before, self.targets)
            )
            refusals[source] = 0 if change < 0 else refusals[source] + 1
            if change >= 0:
                self._undo(region, 0)

    def _grow_region(self, row: tuple[int, ...], source: int, size: float) -> list[int]:
        """
        Moves the units of a conversation, then neighbors with the smallest cut, up to `size` conversations. The region
        ends where, after a quarter of them, the cut was smallest for what was gained.
        """
        region: list[int] = []
        heap = [(-float("inf"), 0, unit) for unit in row]
        gained, straddling, best, length = 0, 0, float("inf"), 0
        while heap and (len(region) < len(row) or (gained < size and self.evaluation[source] < self.targets[source])):
            cost, age, unit = heappop(heap)
            if self.is_held_out[unit]:
                continue
            current = self.find_cut_change(unit)
            if current > cost and len(region) >= len(row):  # the cost has risen since
                heappush(heap, (current, age, unit))
                continue
            gained += sum(evaluation for _, evaluation in self.find_changes(unit).values())
            self.move(unit)
            region.append(unit)
            straddling += current
            for other in self._find_neighbors(unit):
                if not self.is_held_out[other]:
                    heappush(heap, (self.find_cut_change(other), len(region), other))
            if len(region) >= len(row) and gained >= size / 4 and straddling / gained <= best:
                best, length = straddling / gained, len(region)
        self._undo(region, length or len(region))
        return region

    def refine(self) -> None:
        """Passes of moves along the cut, until they keep no more conversations."""
        for _ in range(MAX_PASSES):
            if not self._refine_once():
                return

    def _refine_once(self) -> bool:
        """One pass of moves along the cut, each unit once, up to the best state; whether more is kept."""
        cut = (units for units, count in self.num_held_out.items() if 0 < count < len(units))
        boundary = sorted({unit for units in cut for unit in units if not self.is_fixed[unit]})
        heap = [(self.find_loss(unit), unit) for unit in boundary]
        heapify(heap)
        moved: list[int] = []
        locked: set[int] = set()
        kept, best, length = 0.0, 0.5, 0
        while heap and len(moved) - length < MAX_STALLED:
            loss, unit = heappop(heap)
            if unit in locked:
                continue
            current = self.find_loss(unit)
            if current > loss + 1e-6:
                heappush(heap, (current, unit))
                continue
            self.move(unit)
            moved.append(unit)
            locked.add(unit)
            kept -= current
            if kept > best:
                best, length = kept, len(moved)
            for other in self._find_neighbors(unit):
                if other not in locked:
                    heappush(heap, (self.find_loss(other), other))
        self._undo(moved, length)
        return length > 0

    def _undo(self, moved: list[int], length: int) -> None:
        while len(moved) > length:
            self.move(moved.pop())

    def assign_sides(self, rng: random.Random) -> list[str]:
        """The side of each conversation, once no source is dropped as a whole and none has too much evaluation."""
        first = dict(zip(reversed(self.sources), reversed(self.rows)))
        while lost := [source for source in sorted(first) if self.train[source] + self.evaluation[source] == 0]:
            for unit in first[lost[0]]:
                if self.is_held_out[unit]:
                    self.move(unit)
        counts = [self.num_held_out[row] for row in self.rows]
        sides = [
            "train" if count == 0 else "evaluation" if count == len(row) else "straddling"
            for row, count in zip(self.rows, counts)
        ]
        for source, train in enumerate(self.train):
            most = int(train * self.highest_share / (1 - self.highest_share))
            if self.is_balanced[source] and 0 < most < self.evaluation[source]:
                members = [i for i, side in enumerate(sides) if side == "evaluation" and self.sources[i] == source]
                for index in rng.sample(members, len(members) - most):
                    sides[index] = "surplus"
        return sides
