"""What an evaluation asks: conversations with reference answers, from suites in their published formats."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


RESERVED_GROUPS = ("round", "images", "step")  # what results are always broken down by


class SuiteError(ValueError):
    """A suite's file that is missing or in another format: says file, record and what was expected."""


def check_groups(groups: Any, where: str) -> dict[str, str]:
    """The `groups` of a record, by default none; a [`SuiteError`] if they are not texts by name."""
    groups = {} if groups is None else groups
    if not isinstance(groups, dict) or not all(isinstance(value, str) for value in groups.values()):
        raise SuiteError(f"{where} has the groups {groups!r:.80}; expected {{'name': 'value', …}}, of text.")
    return groups


@dataclass(frozen=True)
class Round:
    """One question of a conversation."""

    # Blocks of the user's message: `{"type": "text", "text": …}`, or `{"type": "image", …}` as the processor takes it.
    content: tuple[dict[str, Any], ...]
    references: tuple[str, ...] = ()  # answers of which each is right; a letter for a choice; empty if there is none
    choices: tuple[str, ...] = ()  # the texts of the options, the first one "A"
    # How the conversation so far is changed before its last question is asked again, instead of a new one: `edits.py`.
    edit: dict[str, Any] | None = None


@dataclass(frozen=True)
class Example:
    """One conversation to hold."""

    key: str  # unique in its suite, the same in every run
    rounds: tuple[Round, ...]
    system: str | None = None  # the system instruction; by default the template's
    # What results are broken down by, as `{"task": "counting"}`; not by a name in `RESERVED_GROUPS`.
    groups: dict[str, str] = field(default_factory=dict)

    @property
    def num_images(self) -> int:
        """Number of images shown in all rounds."""
        return sum(block["type"] == "image" for each in self.rounds for block in each.content)


@dataclass(frozen=True)
class Suite:
    """A benchmark in its published format."""

    name: str
    description: str
    reference: str  # the paper or page that defines it
    # From the local folder or file, or the name on the Hub, to its examples; raises `SuiteError`.
    load: Callable[[str | Path], Iterator[Example]]
    metrics: tuple[str, ...]  # names in `METRICS`, the deciding one first
    source: str | None = None  # name on the Hub, if it is published there
    mean_over: str | None = None  # the group whose parts the published score weighs equally, as `"task"`
    max_new_tokens: int = 256
