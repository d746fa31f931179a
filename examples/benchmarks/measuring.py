"""CPU or device time, and peak memory, of functions that are compared with a first one, in interleaved repeats."""

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile


USES_GPU = torch.cuda.is_available()
DEVICE = "cuda" if USES_GPU else "cpu"
DTYPE = torch.bfloat16 if USES_GPU else torch.float32


@dataclass(frozen=True)
class Measured:
    """Times and memory of a function beside those of the first."""

    seconds: float  # median
    ratio: float  # of the medians
    quartiles: tuple[float, float]  # of the ratio, first and third
    peak_bytes: int  # beyond what was allocated before the call


def compare(variants: dict[str, Callable[[], object]], repeats: int) -> dict[str, Measured]:
    """
    Measures functions without arguments, by name, in interleaved repeats; ratios are to the first.

    Each is called twice before, to warm up and to measure its memory.
    """
    memory = {}
    for name, function in variants.items():
        function()
        memory[name] = peak_bytes(function)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, function in variants.items():
            times[name].append(measure(function))
    baseline = times[next(iter(variants))]
    measured = {}
    for name, seconds in times.items():
        low, _, high = statistics.quantiles([one / base for one, base in zip(seconds, baseline)], n=4)
        median = statistics.median(seconds)
        measured[name] = Measured(median, median / statistics.median(baseline), (low, high), memory[name])
    return measured


def measure(function: Callable[[], object]) -> float:
    """Seconds of one call: CPU time, or device time between two events."""
    if not USES_GPU:
        start = time.process_time()
        function()
        return time.process_time() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def peak_bytes(function: Callable[[], object]) -> int:
    """Peak allocation of one call."""
    if USES_GPU:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events), default=0)
