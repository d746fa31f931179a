"""The ingestion of a dataset: its records are read once, cached by `datasets`, and all accounted for."""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, Features, Json, List, Value

from ..conversation_visualchat import validate_conversation
from .conversation import OUTSIDE, Conversation, Dropped
from .files import cache_rows
from .images import MISSING_IMAGE, ImageReference
from .tables import counted


@dataclass(frozen=True)
class IngestedRecord:
    """The outcome of one raw record, or of the several that form one conversation."""

    where: str  # file and record
    num_records: int  # raw records that are not in an earlier one
    outcome: Conversation | Dropped
    members: tuple[str, ...] = ()  # files and records of all its raw records, if it has several
    key: str | int | None = None  # the id that the record gives itself
    extra: Mapping[str, Any] = field(default_factory=dict)  # fields of the record that the reader was asked for


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
    _uses: Counter[str] = field(default_factory=Counter, repr=False)  # conversations of each record that is a member
    _dropped_later: list[tuple[str, list[str], str]] = field(default_factory=list, repr=False)

    def __str__(self) -> str:
        read, made = counted(self.read, "record"), counted(self.conversations, "conversation")
        lines = [f"{self.name}: {read} read, {self.used:,} used in {made}"]
        lines += [
            f"  {count:>8} {action}: {reason} (as in {example})" for action, count, reason, example in self.reasons()
        ]
        return "\n".join(lines)

    def reasons(self) -> Iterator[tuple[str, int, str, str]]:
        """Why records were dropped, repaired or reused: the action, their number, the reason and the first one."""
        for action, counts in (("dropped", self.dropped), ("repaired", self.repaired)):
            for reason, count in counts.most_common():
                yield action, count, reason, self.examples[reason]
        if reused := {where: uses for where, uses in self._uses.items() if uses > 1}:
            uses = f"{sum(reused.values()) / len(reused):.1f} conversations on average, at most {max(reused.values())}"
            yield "reused", len(reused), f"in {uses}", next(iter(reused))

    @property
    def num_dropped(self) -> int:
        """Raw records that were dropped."""
        return self.dropped.total()

    def drop(self, row: dict, reason: str, images: Sequence[str] = ()) -> None:
        """Drops a conversation, used so far, with those of its records that no other conversation uses."""
        self.conversations -= 1
        for where in row["members"] or [row["where"]]:
            self._uses[where] -= 1
            if self._uses[where] <= 0:
                self.used -= 1
                self._count(self.dropped, reason, _name(where, images), 1)
                self._dropped_later.append((where, list(images), reason))

    def require_conversations(self) -> None:
        if self.conversations == 0:
            raise ValueError(f"Nothing is left of the source {self.name}.\n{self}")

    def list_dropped(self) -> Iterator[dict[str, str]]:
        """Every record that was dropped: its source, file and place there, the image that is at fault, the reason."""
        for where, images, reason in (*self._read_dropped(), *self._dropped_later):
            file, record = split_place(where)
            yield {"source": self.name, "file": file, "record": record, "image": " or ".join(images), "reason": reason}

    def _read_dropped(self) -> Iterator[tuple[str, list[str], str]]:
        if self.rows is not None:
            columns = ["where", "members", "images", "dropped"]
            for batch in self.rows.select_columns(columns).with_format("arrow").iter(10_000):
                for row in batch.filter(pc.field("dropped") != "").to_pylist():
                    yield from ((where, row["images"], row["dropped"]) for where in row["members"] or [row["where"]])

    def _count(self, counts: Counter[str], reason: str, where: str, num_records: int) -> None:
        counts[reason] += num_records
        self.examples.setdefault(reason, where)

    @classmethod
    def from_rows(cls, name: str, rows: Dataset) -> "IngestionReport":
        """Sums up the cached rows."""
        report = cls(name, rows=rows)
        columns = ["where", "num_records", "members", "images", "dropped", "repairs"]
        for batch in rows.select_columns(columns).with_format("arrow").iter(10_000):
            for row in batch.to_pylist():
                where, count, members, images, reason, repairs = map(row.get, columns)
                report.read += count
                if reason:
                    report._count(report.dropped, reason, _name(where, images), count)
                elif count:
                    report.used += count
                    report.conversations += 1
                    report._uses.update(members)
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
        "members": List(Value("string")),
        "dropped": Value("string"),
        "repairs": List(Value("string")),
    }
)
EMPTY_ROW = {"messages": [], "images": [], "where": "", "num_records": 0, "members": [], "dropped": "", "repairs": []}


def ingest(
    name: str, generate: Callable[..., Iterator[IngestedRecord]], root: Path, files: Iterable[Path], options: dict
) -> tuple[Dataset, IngestionReport]:
    """
    Reads a dataset, or finds its cached rows: the conversations and the report, see [`load_source`].

    `generate(**options)` yields the outcome of every record, with image paths absolute or relative to the root, which
    is absolute. `files` are those that it reads; beside them, the rows depend on which images are there.
    """
    arguments = {"generate": generate, "options": options, "root": str(root)}
    files = {*files}
    is_current = partial(_finds_the_same_images, root, {str(file) for file in files})
    rows = cache_rows(_generate_rows, FEATURES, arguments, sorted(files), is_current=is_current)
    report = IngestionReport.from_rows(name, rows)
    report.require_conversations()
    used = [row for row, reason in enumerate(rows["dropped"][:]) if row and not reason]
    return rows.select(used).select_columns(["messages", "images", "where", "members"]), report


def _finds_the_same_images(root: Path, files: set[str], rows: Dataset) -> bool:
    """Whether all images outside of the files are still there that were, and none that were not."""
    table = rows.select_columns(["images", "dropped"]).with_format("arrow")[:]
    for reason in pc.unique(table["dropped"]).to_pylist():
        names = pc.unique(pc.list_flatten(table.filter(pc.field("dropped") == reason)["images"])).to_pylist()
        images = (ImageReference.parse(name).under(root) for name in names if reason != OUTSIDE.reason)
        if any(image.is_local and image.path not in files and image.exists() == bool(reason) for image in images):
            return False
    return True


def split_place(where: str) -> list[str]:
    """The file and the record."""
    return re.split(r"(?<=\w), ", where, maxsplit=1)


def _name(where: str, images: Sequence[str]) -> str:
    """A record, and where its faulty image was looked for."""
    return f"{where}: {' or '.join(images)}" if images else where


def to_text(text: str) -> str:
    """Text without what UTF-8 cannot encode."""
    return text.encode("utf-8", "replace").decode()


def _generate_rows(generate: Callable[..., Iterator[IngestedRecord]], options: dict, root: str) -> Iterator[dict]:
    yield EMPTY_ROW  # `datasets` cannot build an empty dataset
    for record in generate(**options):
        row = {**EMPTY_ROW, "num_records": record.num_records, "where": to_text(record.where)}
        row["members"] = [*map(to_text, record.members)]
        row["images"] = [to_text(str(image.relative_to(root))) for image in record.outcome.images]
        if isinstance(record.outcome, Dropped):
            row["dropped"] = record.outcome.reason
        else:
            # As text, which `datasets` accepts for JSON; it would walk through every block of a list.
            row["messages"] = json.dumps(record.outcome.under(root).messages())
            row["repairs"] = list(record.outcome.repairs)
        yield row


def check_record(record: IngestedRecord, root: str | Path = "", control_tokens: Sequence[str] = ()) -> IngestedRecord:
    """
    The record itself if its conversation is valid, its text without special tokens and its images exist, else the
    reason to drop it.
    """
    fault = None if isinstance(record.outcome, Dropped) else _find_fault(record.outcome, root, control_tokens)
    return replace(record, outcome=fault or record.outcome)


def _find_fault(conversation: Conversation, root: str | Path, control_tokens: Sequence[str]) -> Dropped | None:
    try:
        messages = conversation.messages()
        validate_conversation(messages)
        json.dumps(messages, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return Dropped("text that is not Unicode")
    except ValueError as error:
        return Dropped("a round without text, or with a literal <image>", f"is invalid: {error}")
    try:
        validate_conversation(messages, control_tokens)
    except ValueError as error:
        return Dropped("a special token in its text", f"is invalid: {error}")
    for image in (image.under(root) for image in conversation.images):
        if fault := image.find_fault():
            name = image.key or os.path.basename(image.path)
            detail = f"there is no file at {image}" if fault == MISSING_IMAGE else f"it is {fault}"
            return Dropped(fault, f"names the image {name}; {detail}", (image,))
    return None
