"""Means of scores with bootstrap intervals, over all rounds and broken down."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class ScoredRound:
    """The score of one round, and what it is broken down by."""

    conversation: str  # the key of its conversation
    score: float | None  # `None` if it could not be scored
    parts: tuple[tuple[str, str], ...] = ()  # as `("round", "1"), ("task", "counting")`


@dataclass(frozen=True)
class Mean:
    """The mean score of some rounds, and its 95% interval, if there are two conversations or more."""

    mean: float
    low: float | None
    high: float | None
    num_rounds: int
    num_conversations: int
    num_missing: int = 0  # rounds without a score, which are not in the mean


def average(*parts: Iterable[ScoredRound], seed: int = 0) -> Mean | None:
    """
    The mean over rounds; of several parts, the mean of their means. The interval is that of the percentile bootstrap
    over whole conversations of each part (2,000 resamples), since the rounds of one conversation depend on each other;
    `None` if no round has a score.
    """
    num_missing = 0
    by_part: list[tuple[np.ndarray, np.ndarray]] = []  # the sum and the number of scores, by conversation
    for part in parts:
        sums: dict[str, list[float]] = {}
        for each in part:
            if each.score is None:
                num_missing += 1
            else:
                total = sums.setdefault(each.conversation, [0.0, 0.0])
                total[0] += each.score
                total[1] += 1
        if sums:
            totals, counts = np.array(list(sums.values())).T
            by_part.append((totals, counts))
    if not by_part:
        return None
    mean = float(np.mean([totals.sum() / counts.sum() for totals, counts in by_part]))
    num_conversations = sum(len(totals) for totals, _ in by_part)
    low = high = None
    if num_conversations > 1:
        rng = np.random.default_rng(seed)
        sampled = np.zeros(RESAMPLES)
        for totals, counts in by_part:
            for number in range(RESAMPLES):
                rows = rng.integers(len(totals), size=len(totals))
                sampled[number] += totals[rows].sum() / counts[rows].sum() / len(by_part)
        low, high = map(float, np.quantile(sampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    return Mean(mean, low, high, int(sum(counts.sum() for _, counts in by_part)), num_conversations, num_missing)


def break_down(rounds: Sequence[ScoredRound], mean_over: str | None = None, seed: int = 0) -> dict[str, Any]:
    """
    `{"all": mean, "by": {"round": {"1": mean, …}, "images": {…}, …}}`, means as dictionaries; and as `mean_over` the
    mean of the means of one kind of parts.
    """
    total = average(rounds, seed=seed)
    groups: dict[str, dict[str, list[ScoredRound]]] = {}
    for each in rounds:
        for kind, value in each.parts:
            groups.setdefault(kind, {}).setdefault(value, []).append(each)
    means = {
        kind: {value: mean for value in sorted(parts, key=natural_order) if (mean := average(parts[value], seed=seed))}
        for kind, parts in groups.items()
    }
    found = {
        "all": None if total is None else asdict(total),
        "num_missing": sum(each.score is None for each in rounds),
        "by": {kind: {value: asdict(mean) for value, mean in parts.items()} for kind, parts in means.items()},
    }
    if mean_over is not None and (mean := average(*groups.get(mean_over, {}).values(), seed=seed)):
        found["mean_over"] = {"parts": mean_over, **asdict(mean)}
    return found


def natural_order(text: str) -> tuple[bool, int, str]:
    """Numbers in their order, then text."""
    return (not text.isdecimal(), int(text) if text.isdecimal() else 0, text)
