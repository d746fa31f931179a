"""What became of the records of a source: read once, kept by `datasets`, and every record accounted for."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value
from datasets.exceptions import DatasetGenerationError

from .conversation_visualchat import is_image, validate_conversation
from .image_archives import find_archive, open_archive, split_archived
from .record_shapes import Messages
from .source_converters import Conversation, Dropped


Check = Callable[[list[str]], bool]
NUM_EXAMPLES = 5
ARCHIVES = (".json", ".parquet")


@dataclass(frozen=True)
class Reading:
    """
    What became of one raw record, or of the records that form one conversation.

    Args:
        where (`str`): The file and the record.
        num_records (`int`): How many raw records it stands for.
        outcome (`Conversation`, `Messages` or `Dropped`): What became of them.
    """

    where: str
    num_records: int
    outcome: Conversation | Messages | Dropped


@dataclass
class SourceReport:
    """
    How the records of a source fared; `read` is always `used` plus what was dropped.

    Args:
        name (`str`): The source.
        read, used (`int`): Raw records.
        conversations (`int`): What they became.
        num_repaired (`int`): Raw records that are used after something was mended.
        dropped, repaired (`dict`): Numbers of records by reason; one may be repaired for several.
        examples (`dict`): For every reason the first few records that it holds for, file and record.
        rows (`datasets.Dataset`, *optional*): All readings, memory-mapped.
    """

    name: str
    read: int = 0
    used: int = 0
    conversations: int = 0
    num_repaired: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    repaired: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    rows: Dataset | None = field(default=None, repr=False)
    _dropped_later: list[tuple[str, str]] = field(default_factory=list, repr=False)

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.read} records read, {self.used} used in {self.conversations} conversations"]
        for title, reasons in (("dropped", self.dropped), ("repaired", self.repaired)):
            for reason, count in sorted(reasons.items(), key=lambda item: -item[1]):
                lines.append(f"  {count:>8} {title}: {reason} (as in {self.examples[reason][0]})")
        return "\n".join(lines)

    def drop(self, where: str, num_records: int, reason: str) -> None:
        """Counts a conversation, used so far, as dropped."""
        self.used -= num_records
        self.conversations -= 1
        self.dropped[reason] = self.dropped.get(reason, 0) + num_records
        self._note(reason, where)
        self._dropped_later.append((where, reason))

    def list_dropped(self) -> Iterator[tuple[str, str]]:
        """Every record, or first of several, that was dropped, and the reason."""
        if self.rows is not None:
            for batch in self.rows.select_columns(["where", "dropped"]).iter(10_000):
                yield from ((where, reason) for where, reason in zip(batch["where"], batch["dropped"]) if reason)
        yield from self._dropped_later

    def _note(self, reason: str, where: str) -> None:
        examples = self.examples.setdefault(reason, [])
        if len(examples) < NUM_EXAMPLES:
            examples.append(where)

    @classmethod
    def of_rows(cls, name: str, rows: Dataset) -> "SourceReport":
        """Adds up what [`keep_readings`] keeps."""
        report = cls(name, rows=rows)
        columns = ["where", "num_records", "dropped", "repairs"]
        for batch in rows.select_columns(columns).with_format("arrow").iter(10_000):
            for where, count, reason, repairs in zip(*(batch[column].to_pylist() for column in columns)):
                if count == 0:
                    continue
                report.read += count
                if reason:
                    report.dropped[reason] = report.dropped.get(reason, 0) + count
                    report._note(reason, where)
                    continue
                report.used += count
                report.conversations += 1
                report.num_repaired += count if repairs else 0
                for repair in dict.fromkeys(repairs):
                    report.repaired[repair] = report.repaired.get(repair, 0) + count
                    report._note(repair, where)
        return report


ROWS = Features(
    {
        "messages": Value("large_string"),
        "images": List(Value("string")),
        "where": Value("string"),
        "num_records": Value("int64"),
        "dropped": Value("string"),
        "repairs": List(Value("string")),
    }
)
NOTHING = {"messages": "", "images": [], "where": "", "num_records": 0, "dropped": "", "repairs": []}


def keep_readings(name: str, generate: Callable[..., Iterator[dict]], options: dict) -> tuple[Dataset, SourceReport]:
    """
    Reads a source, or finds it read before.

    Args:
        name (`str`): The source.
        generate (`Callable`): From `options` to rows, as [`rows_of_readings`] makes them.
        options (`dict`): Everything that the rows depend on.

    Returns:
        The conversations with the columns `messages` (JSON text, image paths absolute), `images` (their names under
        the data root), `where` and `num_records` (raw records that it stands for); and the [`SourceReport`].

    Raises:
        `ValueError`: nothing is left of the source.
    """
    try:
        rows = Dataset.from_generator(generate, features=ROWS, gen_kwargs=options)
    except DatasetGenerationError as error:
        raise (error.__cause__ or error) from None
    report = SourceReport.of_rows(name, rows)
    if report.conversations == 0:
        raise ValueError(f"Nothing is left of the source {name}.\n{report}")
    used = rows.filter(lambda texts: [text != "" for text in texts], input_columns="messages", batched=True)
    return used.select_columns(["messages", "images", "where", "num_records"]), report


def rows_of_readings(readings: Iterator[Reading], root: str) -> Iterator[dict]:
    """The rows of a source whose image names are relative to `root`."""
    yield NOTHING  # `datasets` reads no file that has no row
    for reading in readings:
        outcome = reading.outcome
        row = {**NOTHING, "num_records": reading.num_records, "where": _as_unicode(reading.where)}
        if isinstance(outcome, Dropped):
            row["dropped"] = outcome.reason
        else:
            messages = outcome.messages()
            for message in messages:
                for block in message["content"] if not isinstance(message["content"], str) else ():
                    if is_image(block) and "path" in block:
                        block["path"] = os.path.join(root, block["path"])
            row |= {"messages": json.dumps(messages), "images": outcome.images, "repairs": list(outcome.repairs)}
        yield row


def check_reading(reading: Reading, are_there: Check) -> Reading:
    """A reading whose conversation is valid and has its images, or why it was dropped."""
    if isinstance(reading.outcome, Dropped):
        return reading
    reason = why_invalid(reading.outcome.messages())
    if reason is not None:
        return replace(reading, outcome=Dropped(reason))
    if are_there(reading.outcome.images):
        return reading
    return replace(reading, outcome=Dropped("an image is not there"))


def why_invalid(messages: list[dict]) -> str | None:
    """Why a conversation cannot be learned from, if it cannot."""
    try:
        validate_conversation(messages)
        json.dumps(messages, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "text that is not Unicode"
    except ValueError:
        return "a round without text, or with a literal <image>"
    return None


def images_are_there(images: list[str], root: Path) -> bool:
    """Whether all images, named under the root, are there; those in archives are known to be images too."""
    with contextlib.suppress(OSError, ValueError):  # a name that no file can have, or an archive that is none
        return all(_is_there(image, root) for image in images if is_file_name(image))
    return False


def _is_there(image: str, root: Path) -> bool:
    archived = split_archived(image)
    if archived is None:
        folder = (root / image).parent
        return Path(image).name in _names_in_folder(folder, stamp_of(folder))
    return find_archive(root / archived[0]) is not None and archived[1] in open_archive(
        os.path.join(root, archived[0])
    )


def reading_key(files: Iterable[Path], *code: str) -> str:
    """What tells these files and folders, read by this code (and this module and what it uses), from others."""
    digest = hashlib.blake2b(digest_size=16)
    for name in ("readings.py", "record_shapes.py", "image_archives.py", "conversation_visualchat.py", *code):
        digest.update((Path(__file__).parent / name).read_bytes())
    for path in files:
        digest.update(str((str(path), stamp_of(path))).encode())
    return digest.hexdigest()


def list_below(folders: Iterable[Path]) -> list[Path]:
    """Folders, all folders in them, and the files that may hold images: where an image is looked for."""
    found: set[Path] = set()
    for folder in folders:
        for path, names, files in os.walk(folder):
            names[:] = [name for name in names if not name.startswith(".")]
            found.add(Path(path))
            found.update(Path(path, file) for file in files if file.endswith(ARCHIVES))
    return sorted(found)


def is_file_name(image: str) -> bool:
    """Whether an image lies in a file, and not at an address or inside of its record."""
    return not image.startswith(("http://", "https://", "inline:"))


def stamp_of(path: Path) -> tuple[int, int] | None:
    """What tells one state of a file or a folder from another."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns


@lru_cache(maxsize=64)
def _names_in_folder(folder: Path, stamp: tuple[int, int] | None) -> frozenset[str]:
    return frozenset(os.listdir(folder)) if folder.is_dir() else frozenset()


def load_json(path: Path) -> Any:
    """The contents of a JSON file; a `ValueError` says where it breaks."""
    return parse_json(path.read_bytes(), str(path))


def parse_json(data: bytes, name: str) -> Any:
    """JSON; a `ValueError` says where it breaks."""
    try:
        return json.loads(data)
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text: {error.reason} at byte {error.start}.") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{name} is not whole JSON: {error.msg} at line {error.lineno}, column {error.colno}. Was it fetched to "
            "its end?"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} cannot be read as JSON: {error}.") from error


def _as_unicode(text: str) -> str:
    return text.encode("utf-8", "replace").decode()
