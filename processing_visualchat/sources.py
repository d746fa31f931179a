"""
The published data sets that VisualChat reads, by name: where their files lie under one data root, and how their
records become conversations.

    from processing_visualchat import load_source

    dataset, report = load_source("otter_mimicit_cgd", "data")
    print(report)

Every raw record is read once and accounted for: used, or dropped for a reason. Images stay where they are; nothing is
written beside the raw data. What was read is kept by `datasets` (Arrow, memory-mapped) under a key of the files and of
this code, so a second start is instant.
"""

import difflib
import hashlib
import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value
from datasets.exceptions import DatasetGenerationError

from .conversation_visualchat import validate_conversation
from .image_archives import find_archive, open_archive, split_archived
from .source_converters import (
    Conversation,
    Dropped,
    blend,
    convert_aokvqa,
    convert_coco_caption,
    convert_llava,
    convert_mimicit,
    convert_minigpt4,
    convert_ocr_vqa,
    convert_sparkles,
    group_mimicit,
)


Check = Callable[[list[str]], bool]


@dataclass(frozen=True)
class Reading:
    """
    What became of one raw record, or of the records that form one conversation.

    Args:
        where (`str`): The file and the record.
        num_records (`int`): How many raw records it stands for.
        outcome (`Conversation` or `Dropped`): What became of them.
    """

    where: str
    num_records: int
    outcome: Conversation | Dropped


@dataclass(frozen=True)
class Source:
    """
    A published data set.

    Args:
        name (`str`): How it is called.
        annotations (`tuple` of `str`): Its files of records under the data root.
        images (`str`): The folder of its images, or the file that holds them as base64.
        read (`Callable`): From the contents of its files by name, `images`, and what tells whether images are there,
            to [`Reading`]s.
        homepage (`str`): Where to get it, and its terms.
    """

    name: str
    annotations: tuple[str, ...]
    images: str
    read: Callable[[dict[str, Any], str, Check], Iterator[Reading]]
    homepage: str


@dataclass
class SourceReport:
    """
    How the records of a source fared; `read` is always `used` plus what was dropped.

    Args:
        name (`str`): The source.
        read, used (`int`): Raw records.
        conversations (`int`): What they became.
        dropped, repaired (`dict`): Numbers of records by reason.
        examples (`dict`): For every reason one record that it holds for.
    """

    name: str
    read: int = 0
    used: int = 0
    conversations: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    repaired: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.read} records read, {self.used} used in {self.conversations} conversations"]
        for title, reasons in (("dropped", self.dropped), ("repaired", self.repaired)):
            for reason, count in sorted(reasons.items(), key=lambda item: -item[1]):
                lines.append(f"  {count:>8} {title}: {reason} (as in {self.examples[reason]})")
        return "\n".join(lines)


def load_source(name: str, data_root: str | Path, check_files: bool = True) -> tuple[Dataset, SourceReport]:
    """
    Reads a source.

    Args:
        name (`str`): One of [`SOURCES`].
        data_root (`str` or `Path`): The folder under which the data sets lie.
        check_files (`bool`, *optional*, defaults to `True`): Drops conversations of which an image is not there.

    Returns:
        A `datasets.Dataset` with the columns `messages` (JSON text, image paths absolute), `images` (their names under
        the data root), `where` and `num_records` (raw records that it stands for); and the [`SourceReport`].

    Raises:
        `ValueError`: an unknown name, a file that is not JSON or of another schema, or a source of which nothing is
            left.
        `FileNotFoundError`: the data root, or a file of the source, is not there.
    """
    source = get_source(name)
    root = Path(data_root)
    if not root.is_dir():
        raise FileNotFoundError(f"No data root at {root}.")
    for file in source.annotations:
        if not (root / file).is_file():
            raise FileNotFoundError(
                f"The source {name} reads {file}; there is no file at {root / file}. See {source.homepage}."
            )
    if source.images.endswith(".json") and find_archive(root / source.images) is None:
        raise FileNotFoundError(
            f"The source {name} has its images in {source.images}; there is no file at {root / source.images}, nor as "
            f"parquet beside it. See {source.homepage}."
        )
    if not source.images.endswith(".json") and not (root / source.images).is_dir():
        raise FileNotFoundError(
            f"The source {name} has its images in {source.images}; there is no folder at {root / source.images}. See "
            f"{source.homepage}."
        )
    options = {"name": name, "root": str(root.resolve()), "check_files": check_files, "key": _key(source, root)}
    try:
        rows = Dataset.from_generator(_generate_rows, features=ROWS, gen_kwargs=options)
    except DatasetGenerationError as error:
        raise (error.__cause__ or error) from None
    report = _report(name, rows)
    used = rows.filter(lambda text: text != "", input_columns="messages")
    if len(used) == 0:
        raise ValueError(f"Nothing is left of the source {name}.\n{report}")
    return used.select_columns(["messages", "images", "where", "num_records"]), report


def get_source(name: str) -> Source:
    """A source by its name; a `ValueError` names the nearest ones."""
    if name not in SOURCES:
        nearest = difflib.get_close_matches(str(name), SOURCES, n=3, cutoff=0.4)
        hint = f"Did you mean {' or '.join(nearest)}?" if nearest else f"There are {', '.join(SOURCES)}."
        raise ValueError(f"There is no source {name!r}. {hint}")
    return SOURCES[name]


def read_source(source: Source, data_root: Path, check_files: bool = True) -> Iterator[Reading]:
    """What became of every record of a source, file after file."""
    root = data_root.resolve()
    contents = {file: _load_json(root / file) for file in source.annotations}
    are_there = partial(_are_there, root=root) if check_files else lambda images: True
    yield from source.read(contents, source.images, are_there)


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


def _generate_rows(name: str, root: str, check_files: bool, key: str) -> Iterator[dict]:
    yield NOTHING  # `datasets` reads no file that has no row
    for reading in read_source(SOURCES[name], Path(root), check_files):
        outcome = reading.outcome
        is_used = isinstance(outcome, Conversation)
        messages = outcome.messages() if isinstance(outcome, Conversation) else []
        for message in messages:
            for block in message["content"] if message["role"] == "user" else ():
                if block["type"] == "image":
                    block["path"] = f"{root}/{block['path']}"
        yield {
            "messages": json.dumps(messages) if is_used else "",
            "images": outcome.images if isinstance(outcome, Conversation) else [],
            "where": reading.where.encode("utf-8", "replace").decode(),
            "num_records": reading.num_records,
            "dropped": outcome.reason if isinstance(outcome, Dropped) else "",
            "repairs": list(outcome.repairs) if isinstance(outcome, Conversation) else [],
        }


def _report(name: str, rows: Dataset) -> SourceReport:
    report = SourceReport(name)
    dropped: Counter[str] = Counter()
    repaired: Counter[str] = Counter()
    columns = ["where", "num_records", "dropped", "repairs"]
    for batch in rows.select_columns(columns).iter(10_000):
        for where, count, reason, repairs in zip(*(batch[column] for column in columns)):
            if count == 0:
                continue
            report.read += count
            if reason:
                dropped[reason] += count
            else:
                report.used += count
                report.conversations += 1
            repaired.update(dict.fromkeys(repairs, count))
            for noted in (reason, *repairs):
                report.examples.setdefault(noted, where)
    report.dropped, report.repaired = dict(dropped), dict(repaired)
    return report


def _key(source: Source, root: Path) -> str:
    """What tells these files, read by this code, from others."""
    digest = hashlib.blake2b(digest_size=16)
    for name in ("sources.py", "source_converters.py", "image_archives.py", "conversation_visualchat.py"):
        digest.update((Path(__file__).parent / name).read_bytes())
    folders = {root / source.images, *((root / file).parent.parent / "images" for file in source.annotations)}
    folders |= {
        Path(entry.path) for folder in folders if folder.is_dir() for entry in os.scandir(folder) if entry.is_dir()
    }
    archives = {find_archive(folder) or folder for folder in folders if folder.suffix == ".json"}
    for path in sorted({*(root / file for file in source.annotations), *folders, *archives}):
        digest.update(str((str(path), _stamp(path))).encode())
    return digest.hexdigest()


def _stamp(path: Path) -> tuple[int, int] | None:
    """What tells one state of a file or a folder from another."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _load_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}.") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not whole JSON: {error.msg} at line {error.lineno}, column {error.colno}. Was it fetched to "
            "its end?"
        ) from error


def _check(reading: Reading, are_there: Check) -> Reading:
    if isinstance(reading.outcome, Dropped):
        return reading
    try:
        messages = reading.outcome.messages()
        validate_conversation(messages)
        json.dumps(messages, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return replace(reading, outcome=Dropped("text that is not Unicode"))
    except ValueError:
        return replace(reading, outcome=Dropped("a round without text, or with a literal <image>"))
    if are_there(reading.outcome.images):
        return reading
    return replace(reading, outcome=Dropped("an image is not there"))


def _are_there(images: list[str], root: Path) -> bool:
    for image in images:
        archived = split_archived(image)
        if archived is not None:
            if find_archive(root / archived[0]) is None or archived[1] not in open_archive(f"{root}/{archived[0]}"):
                return False
        elif Path(image).name not in _names_in_folder((root / image).parent, _stamp((root / image).parent)):
            return False
    return True


@lru_cache(maxsize=64)
def _names_in_folder(folder: Path, stamp: tuple[int, int] | None) -> frozenset[str]:
    return frozenset(os.listdir(folder)) if folder.is_dir() else frozenset()


def _expect(contents: Any, kind: type, file: str, key: str | None = None) -> Any:
    """The records of a file, of the right type."""
    if key is not None:
        contents = contents.get(key) if isinstance(contents, dict) else None
    if not isinstance(contents, kind):
        where = f"under {key!r}" if key else "at its top"
        raise ValueError(f"{file} has another schema: {where} it should have a {kind.__name__}.")
    return contents


def _read_list(convert: Callable[[Any, str], Conversation | Dropped], key: str | None = None):
    def read(files: dict[str, Any], images: str, are_there: Check) -> Iterator[Reading]:
        for file, contents in files.items():
            for index, record in enumerate(_expect(contents, list, file, key)):
                yield _check(Reading(f"{file}, record {index}", 1, convert(record, images)), are_there)

    return read


def _read_sparkles(files: dict[str, Any], images: str, are_there: Check) -> Iterator[Reading]:
    for file, contents in files.items():
        folder = f"{file.partition('/')[0]}/images"
        yield from _read_list(convert_sparkles)({file: contents}, folder, are_there)


def _read_mimicit(files: dict[str, Any], images: str, are_there: Check) -> Iterator[Reading]:
    for file, contents in files.items():
        instructions = _expect(contents, dict, file, "data")
        for group in group_mimicit(instructions):
            outcome = convert_mimicit([instructions[name] for name in group], images)
            yield _check(Reading(f"{file}, {group[0]}", len(group), outcome), are_there)


def _read_ocr_vqa(files: dict[str, Any], images: str, are_there: Check) -> Iterator[Reading]:
    for file, contents in files.items():
        for image_id, record in _expect(contents, dict, file).items():
            yield _check(Reading(f"{file}, {image_id}", 1, convert_ocr_vqa(image_id, record, images)), are_there)


def _read_blend(files: dict[str, Any], images: str, are_there: Check) -> Iterator[Reading]:
    """A pair of CGD with the LLaVA records that it takes; what no pair takes is dropped."""
    *llava_files, pairs_file = files
    about: dict[str, list[Conversation]] = {}
    places: dict[int, str] = {}
    for reading in _read_list(convert_llava)({file: files[file] for file in llava_files}, images, are_there):
        if isinstance(reading.outcome, Conversation):
            about.setdefault(reading.outcome.images[0], []).append(reading.outcome)
            places[id(reading.outcome)] = reading.where
        else:
            yield reading
    rng = random.Random(BLEND_SEED)
    for reading in _read_mimicit({pairs_file: files[pairs_file]}, images, are_there):
        outcome, num_records, pair = reading.outcome, reading.num_records, reading.outcome
        if isinstance(pair, Conversation):
            num_waiting = sum(len(about.get(image, ())) for image in pair.images)
            outcome = blend(pair, about, rng)
            num_records += num_waiting - sum(len(about.get(image, ())) for image in pair.images)
        yield Reading(reading.where, num_records, outcome)
    for conversation in (conversation for waiting in about.values() for conversation in waiting):
        yield Reading(places[id(conversation)], 1, Dropped("no pair speaks of its image"))


BLEND_SEED = 0
COCO = "coco/train2017"
LLAVA_FILES = ("llava/detail_23k.json", "llava/complex_reasoning_77k.json", "llava/conversation_58k.json")
LLAVA = "https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K"
MIMICIT = "https://huggingface.co/datasets/pufanyi/MIMICIT"


def _mimicit(name: str, images: str) -> Source:
    file = f"MIMIC-IT/{name.upper()}_instructions.json"
    return Source(f"otter_mimicit_{name}", (file,), images, _read_mimicit, MIMICIT)


SOURCES = {
    source.name: source
    for source in (
        Source("llava", LLAVA_FILES[:2], COCO, _read_list(convert_llava), LLAVA),
        Source("llava_dial", LLAVA_FILES[2:], COCO, _read_list(convert_llava), LLAVA),
        _mimicit("cgd", COCO),
        Source(
            "llava_otter_blend",
            (*LLAVA_FILES, "MIMIC-IT/CGD_instructions.json"),
            COCO,
            _read_blend,
            f"{LLAVA} and {MIMICIT}",
        ),
        *(_mimicit(name, f"MIMIC-IT/{name.upper()}.json") for name in ("sd", "sn", "tvc", "vst")),
        Source(
            "sparkles_dialogue",
            tuple(f"SparklesDialogue{part}/annotations/SparklesDialogue{part}.json" for part in ("CC", "VG")),
            "SparklesDialogueCC/images",
            _read_sparkles,
            "https://github.com/HYPJUDY/Sparkles",
        ),
        Source(
            "aokvqa",
            ("aokvqa/annotations/aokvqa_v1p0_train.json",),
            COCO,
            _read_list(convert_aokvqa),
            "https://allenai.org/project/a-okvqa",
        ),
        Source(
            "coco_caption",
            ("coco_caption/dataset.json",),
            "coco/2014",
            _read_list(convert_coco_caption, "images"),
            "https://cs.stanford.edu/people/karpathy/deepimagesent/",
        ),
        Source("ocr_vqa", ("OCR_VQA/dataset.json",), "OCR_VQA/images", _read_ocr_vqa, "https://ocr-vqa.github.io"),
        Source(
            "minigpt4",
            ("cc_sbu_align/filter_cap.json",),
            "cc_sbu_align/image",
            _read_list(convert_minigpt4, "annotations"),
            "https://huggingface.co/datasets/Vision-CAIR/cc_sbu_align",
        ),
    )
}  # fmt: skip
