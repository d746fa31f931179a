"""
The evaluation suites by name, one file for each benchmark.

    for example in get_suite("blink").load("data/BLINK"):
        ...

A suite is read where its publishers put it: from a local folder or file, or by its name on the Hub. Examples are read
one after the other; a fault is a [`SuiteError`] that names file, record and what was expected, and nothing is skipped.
"""

from ..names import find_name
from ..records import Suite
from .blink import BLINK
from .deepspeed_visualchat import EVAL_COMPREHENSIVE, EVAL_ROBUSTNESS, EVAL_SINGLE
from .mantis_eval import MANTIS_EVAL
from .milebench import MILEBENCH
from .mm_niah import MM_NIAH
from .mmdu import MMDU
from .mmiu import MMIU
from .muirbench import MUIRBENCH
from .nlvr2 import NLVR2
from .sparkles_eval import SPARKLES_EVAL


_ORIGINAL = (EVAL_SINGLE, EVAL_COMPREHENSIVE, EVAL_ROBUSTNESS)
_ALL = (*_ORIGINAL, MMDU, SPARKLES_EVAL, BLINK, MUIRBENCH, MANTIS_EVAL, MMIU, NLVR2, MM_NIAH, MILEBENCH)
SUITES: dict[str, Suite] = {suite.name: suite for suite in _ALL}


def get_suite(name: str) -> Suite:
    """A suite by name; a `ValueError` names the nearest one."""
    return SUITES[find_name(name, SUITES, "suite")]
