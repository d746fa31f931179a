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


def average(rounds: Iterable[ScoredRound], seed: int = 0) -> Mean | None:
    """
    The mean over rounds. The interval is that of the percentile bootstrap over whole conversations (2,000 resamples),
    since the rounds of one conversation depend on each other; `None` if no round has a score.
    """
    sums: dict[str, list[float]] = {}
    num_missing = 0
    for each in rounds:
        if each.score is None:
            num_missing += 1
        else:
            total = sums.setdefault(each.conversation, [0.0, 0.0])
            total[0] += each.score
            total[1] += 1
    if not sums:
        return None
    totals, counts = np.array(list(sums.values())).T
    low = high = None
    if len(totals) > 1:
        rng = np.random.default_rng(seed)
        chosen = (rng.integers(len(totals), size=len(totals)) for _ in range(RESAMPLES))
        means = [totals[rows].sum() / counts[rows].sum() for rows in chosen]
        low, high = map(float, np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    return Mean(float(totals.sum() / counts.sum()), low, high, int(counts.sum()), len(totals), num_missing)


def break_down(rounds: Sequence[ScoredRound], seed: int = 0) -> dict[str, Any]:
    """`{"all": mean, "by": {"round": {"1": mean, …}, "images": {…}, …}}`, means as dictionaries."""
    total = average(rounds, seed)
    groups: dict[str, dict[str, list[ScoredRound]]] = {}
    for each in rounds:
        for kind, value in each.parts:
            groups.setdefault(kind, {}).setdefault(value, []).append(each)
    means = {
        kind: {value: mean for value in sorted(parts, key=_natural) if (mean := average(parts[value], seed))}
        for kind, parts in groups.items()
    }
    return {
        "all": None if total is None else asdict(total),
        "num_missing": sum(each.score is None for each in rounds),
        "by": {kind: {value: asdict(mean) for value, mean in parts.items()} for kind, parts in means.items()},
    }


def _natural(text: str) -> tuple[bool, int, str]:
    """Numbers in their order, then text."""
    return (not text.isdecimal(), int(text) if text.isdecimal() else 0, text)
