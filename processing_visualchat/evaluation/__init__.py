"""Evaluation of a checkpoint on suites of conversations: see `examples/evaluate.py`."""

from .card import update_card
from .evaluation import SUITES, evaluate
from .judge import Judge
from .metrics import METRICS
from .records import Example, Round, Suite, SuiteError
from .results import format_results, score_answers
from .robustness import ROBUSTNESS


__all__ = [
    "METRICS",
    "ROBUSTNESS",
    "SUITES",
    "Example",
    "Judge",
    "Round",
    "Suite",
    "SuiteError",
    "evaluate",
    "format_results",
    "score_answers",
    "update_card",
]
