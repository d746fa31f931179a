"""The ingestion of a dataset: its records are read once, cached by `datasets`, and all accounted for."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from datasets import Dataset, Features, Json, List, Value

from ..conversation_visualchat import validate_conversation
from .conversation import Conversation, Dropped
from .files import cache_rows


@dataclass(frozen=True)
class IngestedRecord:
    """The outcome of one raw record, or of the several that form one conversation."""

    where: str  # file and record
    num_records: int
    outcome: Conversation | Dropped


@dataclass
class IngestionReport:
    """The outcome of all raw records of a dataset; `read` is always `used` plus what was dropped."""

    name: str
    read: int = 0
    used: int = 0
    conversations: int = 0  # made of the used records
    num_repaired: int = 0  # used after a repair
    dropped: Counter[str] = field(default_factory=Counter)  # records by reason
    repaired: Counter[str] = field(default_factory=Counter)  # by reason; a record may have several
    examples: dict[str, str] = field(default_factory=dict)  # the first file and record, by reason
    rows: Dataset | None = field(default=None, repr=False)  # the outcomes of all records, memory-mapped
    _dropped_later: list[tuple[str, str]] = field(default_factory=list, repr=False)

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.read} records read, {self.used} used in {self.conversations} conversations"]
        lines += [
            f"  {count:>8} {action}: {reason} (as in {example})" for action, count, reason, example in self.reasons()
        ]
        return "\n".join(lines)

    def reasons(self) -> Iterator[tuple[str, int, str, str]]:
        """Why records were dropped or repaired: the action, their number, the reason and the first one."""
        for action, counts in (("dropped", self.dropped), ("repaired", self.repaired)):
            for reason, count in counts.most_common():
                yield action, count, reason, self.examples[reason]

    @property
    def num_dropped(self) -> int:
        """Raw records that were dropped."""
        return self.dropped.total()

    def drop(self, where: str, num_records: int, reason: str) -> None:
        """Counts a conversation, used so far, as dropped."""
        self.used -= num_records
        self.conversations -= 1
        self._count(self.dropped, reason, where, num_records)
        self._dropped_later.append((where, reason))

    def require_conversations(self) -> None:
        if self.conversations == 0:
            raise ValueError(f"Nothing is left of the source {self.name}.\n{self}")

    def list_dropped(self) -> Iterator[tuple[str, str]]:
        """Every record, or first of several, that was dropped, and the reason."""
        if self.rows is not None:
            for batch in self.rows.select_columns(["where", "dropped"]).iter(10_000):
                yield from ((where, reason) for where, reason in zip(batch["where"], batch["dropped"]) if reason)
        yield from self._dropped_later

    def _count(self, counts: Counter[str], reason: str, where: str, num_records: int) -> None:
        counts[reason] += num_records
        self.examples.setdefault(reason, where)

    @classmethod
    def from_rows(cls, name: str, rows: Dataset) -> "IngestionReport":
        """Sums up the cached rows."""
        report = cls(name, rows=rows)
        columns = ["where", "num_records", "dropped", "repairs"]
        for batch in rows.select_columns(columns).with_format("arrow").iter(10_000):
            for where, count, reason, repairs in zip(*(batch[column].to_pylist() for column in columns)):
                report.read += count
                if reason:
                    report._count(report.dropped, reason, where, count)
                elif count:
                    report.used += count
                    report.conversations += 1
                    report.num_repaired += count if repairs else 0
                    for repair in dict.fromkeys(repairs):
                        report._count(report.repaired, repair, where, count)
        return report


FEATURES = Features(
    {
        "messages": Json(),
        "images": List(Value("string")),
        "where": Value("string"),
        "num_records": Value("int64"),
        "dropped": Value("string"),
        "repairs": List(Value("string")),
    }
)
EMPTY_ROW = {"messages": [], "images": [], "where": "", "num_records": 0, "dropped": "", "repairs": []}
MISSING_IMAGE = "an image is not there"
BROKEN_IMAGE = "an image that is broken, or one pixel wide or high"


def ingest(
    name: str, generate: Callable[..., Iterator[IngestedRecord]], root: Path, files: Iterable[Path], options: dict
) -> tuple[Dataset, IngestionReport]:
    """
    Reads a dataset, or finds its cached rows: the conversations and the report, see [`load_source`].

    `generate(**options)` yields the outcome of every record, with image paths absolute or relative to the root, which
    is absolute. `files` are all files and folders that it depends on.
    """
    arguments = {"generate": generate, "options": options, "root": str(root)}
    rows = cache_rows(_generate_rows, FEATURES, arguments, files)
    report = IngestionReport.from_rows(name, rows)
    report.require_conversations()
    used = rows.filter(_is_used, input_columns=["num_records", "dropped"], batched=True)
    return used.select_columns(["messages", "images", "where", "num_records"]), report


def _is_used(counts: list[int], reasons: list[str]) -> list[bool]:
    return [count > 0 and not reason for count, reason in zip(counts, reasons)]


def _generate_rows(generate: Callable[..., Iterator[IngestedRecord]], options: dict, root: str, key: str):
    yield EMPTY_ROW  # `datasets` cannot build an empty dataset
    for record in generate(**options):
        row = {**EMPTY_ROW, "num_records": record.num_records}
        row["where"] = record.where.encode("utf-8", "replace").decode()
        if isinstance(record.outcome, Dropped):
            row["dropped"] = record.outcome.reason
        else:
            row["images"] = [str(image.relative_to(root)) for image in record.outcome.images]
            # As text, which `datasets` accepts for JSON; it would walk through every block of a list.
            row["messages"] = json.dumps(record.outcome.under(root).messages())
            row["repairs"] = list(record.outcome.repairs)
        yield row


def check_record(record: IngestedRecord, root: str | Path = "") -> IngestedRecord:
    """The record itself if its conversation is valid and all images exist, else the reason to drop it."""
    fault = None if isinstance(record.outcome, Dropped) else _find_fault(record.outcome, root)
    return replace(record, outcome=fault or record.outcome)


def _find_fault(conversation: Conversation, root: str | Path) -> Dropped | None:
    try:
        messages = conversation.messages()
        validate_conversation(messages)
        json.dumps(messages, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return Dropped("text that is not Unicode")
    except ValueError as error:
        return Dropped("a round without text, or with a literal <image>", f"is invalid: {error}")
    for image in (image.under(root) for image in conversation.images):
        if not image.exists():
            name = image.key or os.path.basename(image.path)
            return Dropped(MISSING_IMAGE, f"names the image {name}; there is no file at {image}")
    return None
