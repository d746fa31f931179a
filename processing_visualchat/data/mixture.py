"""
A training mixture: several datasets, split by image, sampled, and grouped into longer conversations.

A mixture is one YAML file:

    data_root: data              # the folder that everything is relative to
    seed: 0                      # the same seed gives the same mixture, on any number of processes
    max_images: 8                # conversations with more are dropped, and groups never have more
    eval_share: 0.1              # of the conversations of each source; no image is on both sides
    sources:
      - name: llava              # one of `SOURCES`
        samples: all             # or a number, or a share like 0.5
        concatenate: 3           # groups of 1 to 3 conversations, each used once
        weight: 1.0              # passes per epoch; 2 is twice, 0.5 half of the conversations
      - name: mine               # a custom dataset, of a schema in schemas.py
        path: mine/train.jsonl   # a file (.jsonl, .json, .parquet, .arrow), a folder, or a pattern like mine/*.parquet
        images: pictures         # its image folder, which no image path leaves; by default that of the file
        columns: {chat: messages, photo: images, "[IMG]": placeholder}  # other names in the file, see `FIELDS`
      - name: theirs
        hub: user/data-set       # the same from the Hub; also `revision`, and `split` (train)

With `streaming: true` it is read while it is trained on, see `streaming.py`.

Data flows one way: datasets → split by image → samples → groups. Images are told apart by their pixels, so one with
two paths or formats is one image (if images are not checked, by their bytes); conversations without images by their
text.
"""

import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import yaml
from datasets import Dataset, Features, List, Value, concatenate_datasets

from ..processing_visualchat import VisualChatProcessor
from .conversation import join_messages
from .custom import CustomSource, load_custom_source
from .files import digest_of
from .image_contents import read_image_contents
from .images import ImageContent
from .ingestion import IngestionReport
from .published import SOURCES, get_source, load_source
from .schemas import check_columns
from .split import DROP_REASONS, split_by_image
from .tables import Row, format_table


@dataclass(frozen=True)
class DatasetSpec(CustomSource):
    """
    A dataset of a mixture.

    Args:
        name, path, hub, revision, split, images, columns: See [`CustomSource`]; without path and hub, one of
            [`SOURCES`].
        samples, concatenate, weight: Conversations to use, maximum conversations in a group, and passes per epoch.
    """

    samples: str | int | float = "all"
    concatenate: int = 1
    weight: float = 1.0

    @property
    def is_published(self) -> bool:
        """Whether it is one of [`SOURCES`]."""
        return self.path is None and self.hub is None

    def __post_init__(self):
        for entry in fields(CustomSource):
            name, value = entry.name, getattr(self, entry.name)
            if name != "columns" and not isinstance(value, str) and (value is not None or name in ("name", "split")):
                raise ValueError(f"{name} of the source {self.name!r} is {value!r}; use text.")
        if self.is_published:
            get_source(self.name)
            if given := [name for name in ("revision", "images", "columns") if getattr(self, name)]:
                raise ValueError(f"{self.name} is a published source; it takes no {' and no '.join(given)}.")
        elif self.name in SOURCES:
            raise ValueError(f"{self.name} is the name of a published source; choose another name for yours.")
        check_columns(self.columns, self.name)
        samples, size = self.samples, self.concatenate
        is_share = isinstance(samples, float) and 0 < samples <= 1
        is_number = _is_number(samples) and samples > 0 and int(samples) == samples
        for is_valid, name, wanted in (
            (samples == "all" or is_share or is_number, "samples", "all, a number, or a share between 0 and 1"),
            (isinstance(size, int) and size is not True and size > 0, "concatenate", "a number from 1 up"),
            (_is_number(self.weight) and 0 < self.weight <= 100, "weight", "a number above 0, 1 for one pass"),
        ):
            if not is_valid:
                raise ValueError(f"{name} of {self.name} is {getattr(self, name)!r}; use {wanted}.")

    def load(self, data_root: Path, control_tokens: Sequence[str] = ()) -> tuple[Dataset, IngestionReport]:
        """All its conversations, and the report of its records."""
        if self.is_published:
            return load_source(self.name, data_root, control_tokens)
        return load_custom_source(self, data_root, control_tokens)


@dataclass(frozen=True)
class MixtureConfig:
    """
    The configuration of a mixture; the fields of its YAML file.

    Args:
        sources (`tuple` of [`DatasetSpec`]): Its datasets.
        seed, max_images, eval_share, data_root: As above.
        streaming (`bool`, *optional*, defaults to `False`): For [`stream_mixture`], which reads it during training.
        shuffle_buffer (`int`, *optional*, defaults to 1000): The number of conversations of a source among which a
            stream draws the next one.
    """

    sources: tuple[DatasetSpec, ...]
    seed: int = 0
    max_images: int = 8
    eval_share: float = 0.1
    data_root: str = "data"
    streaming: bool = False
    shuffle_buffer: int = 1000

    def __post_init__(self):
        if not self.sources:
            raise ValueError("A mixture needs sources.")
        names = [spec.name for spec in self.sources]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"The mixture names {', '.join(repeated)} more than once.")
        if not isinstance(self.data_root, str):
            raise ValueError(f"data_root is {self.data_root!r}; use the path of a folder.")
        for name in ("max_images", "shuffle_buffer"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise ValueError(f"{name} is {value!r}; use a number from 1 up.")
        if not isinstance(self.eval_share, (int, float)) or not 0 <= self.eval_share < 1:
            raise ValueError(f"eval_share is {self.eval_share!r}; use a share from 0 to below 1.")

    def find_root(self, data_root: str | Path | None = None) -> Path:
        """The folder that contains the datasets, if not another one."""
        root = Path(data_root or self.data_root)
        if not root.is_dir():
            raise FileNotFoundError(f"No data root at {root}; the mixture names it as data_root, or pass another.")
        return root


@dataclass
class Mixture:
    """
    Args:
        train, evaluation (`datasets.Dataset`): The two sides of the split. Each example is a group of conversations,
            read as one: `messages` (`list[dict]`), `images` (references as text, relative to the data root), `where`
            (files and records), `digests` (of the different images), `source` (the name of the dataset), and the
            number `num_images`.
        reports (`list` of [`IngestionReport`]): The report of each dataset; conversations with too many images or
            broken ones are counted as dropped.
        sizes (`dict`): The number of groups for training and for evaluation, by dataset.
        contents (`dict` of [`ImageContent`]): The digest of every image by its reference.
        conversations (`datasets.Dataset`): All that can be used, each once and by itself.
    """

    train: Dataset
    evaluation: Dataset
    reports: list[IngestionReport]
    sizes: dict[str, tuple[int, int]]
    contents: dict[str, ImageContent] = field(repr=False)
    conversations: Dataset = field(repr=False)

    def source_table(self) -> list[Row]:
        """Records of each dataset, and its groups of conversations on the two sides."""
        rows: list[Row] = [("source", "read", "used", "repaired", "dropped", "train", "evaluation")]
        for report in self.reports:
            counts = (report.read, report.used, report.num_repaired, report.num_dropped)
            rows.append((report.name, *counts, *self.sizes[report.name]))
        return [*rows, ("all", *(sum(column) for column in list(zip(*rows[1:]))[1:]))]

    def __str__(self) -> str:
        return format_table(self.source_table())


def _read_groups(rows: Dataset, batch: dict[str, list]) -> dict[str, list]:
    groups = [[rows[row] for row in numbers] for numbers in batch["rows"]]
    return {
        "messages": [join_messages([row["messages"] for row in group]) for group in groups],
        "images": [[image for row in group for image in row["images"]] for group in groups],
        "where": [[row["where"] for row in group] for group in groups],
    }


def _as_dataset(rows: Dataset, groups: list[list[int]], digests: list[list[str]], sources: list[str]) -> Dataset:
    digests_of = [[digest for row in group for digest in digests[row]] for group in groups]
    columns = {"rows": groups, "num_images": [*map(len, digests_of)]}
    columns["digests"] = [[*dict.fromkeys(shown)] for shown in digests_of]
    columns["source"] = [sources[group[0]] for group in groups]
    features = Features({"rows": List(Value("int64")), "num_images": Value("int32"), "digests": List(Value("string"))})
    features["source"] = Value("string")
    numbers = Dataset.from_dict(columns, features=features)
    return numbers.with_transform(partial(_read_groups, rows), columns=["rows"], output_all_columns=True)


def read_mixture_config(path: str | Path) -> MixtureConfig:
    """Reads the YAML file of a mixture; a `ValueError` names an unknown key or value, with what is allowed."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No mixture at {path}.")
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    _check_keys(values, MixtureConfig, str(path))
    entries = values.get("sources")
    if not isinstance(entries, list):
        raise ValueError(f"{path} needs a list of sources.")
    for entry in entries:
        _check_keys(entry, DatasetSpec, f"A source of {path}")
        if "name" not in entry:
            raise ValueError(f"A source of {path} has no name: {entry!r}.")
    return MixtureConfig(**{**values, "sources": tuple(DatasetSpec(**entry) for entry in entries)})


def load_mixture(
    config: MixtureConfig | str | Path,
    data_root: str | Path | None = None,
    check_images: bool = True,
    processor: VisualChatProcessor | None = None,
) -> Mixture:
    """
    Loads a mixture.

    Args:
        config (`MixtureConfig`, `str` or `Path`): The configuration, or its YAML file.
        data_root (`str` or `Path`, *optional*): The folder that contains the datasets; by default as configured.
        check_images (`bool`, *optional*, defaults to `True`): Decodes every image once, when the mixture is loaded for
            the first time, and drops conversations with broken ones.
        processor (`VisualChatProcessor`, *optional*): The processor of the model; records with one of its special
            tokens in their text are dropped, which otherwise end training.

    Raises:
        `ValueError`: an invalid configuration, or a dataset without a conversation left.
        `FileNotFoundError`: the configuration, or a file of a dataset, does not exist.
    """
    if not isinstance(config, MixtureConfig):
        config = read_mixture_config(config)
    root = config.find_root(data_root)
    tokens = () if processor is None else processor.control_tokens
    loaded = [spec.load(root, tokens) for spec in config.sources]
    reports = [report for _, report in loaded]
    rows = concatenate_datasets([dataset for dataset, _ in loaded])
    source_of = [spec.name for spec, (dataset, _) in zip(config.sources, loaded) for _ in range(len(dataset))]
    images_of = rows.select_columns(["images"]).with_format("arrow")[:]["images"].to_pylist()  # faster than by row
    contents = read_image_contents({image for images in images_of for image in images}, root, check_images)
    reasons = [_find_fault(images, contents, config.max_images) for images in images_of]
    kept = [index for index, (reason, _) in enumerate(reasons) if not reason]
    digests_of = [[contents[image].digest for image in images] for images in images_of]
    # Text alone is told apart by its own digest.
    digests = [digests_of[index] or [_digest_text(rows[index])] for index in kept]
    kept_sources = [source_of[index] for index in kept]
    side_of = dict(zip(kept, split_by_image(digests, kept_sources, config.eval_share, config.seed)))
    for index, side in side_of.items():
        reasons[index] = (DROP_REASONS.get(side, ""), [])
    usable: dict[str, list[int]] = {report.name: [] for report in reports}
    report_of = {report.name: report for report in reports}
    for index, (source, (reason, images)) in enumerate(zip(source_of, reasons)):
        if reason:
            report_of[source].drop(rows[index], reason, images)
        else:
            usable[source].append(index)
    for report in reports:
        report.require_conversations()

    train: list[list[int]] = []
    evaluation: list[list[int]] = []
    num_images = list(map(len, images_of))
    sizes = {}
    for spec in config.sources:
        rng = random.Random(f"{config.seed} {spec.name}")
        chosen = choose(usable[spec.name], spec.samples, rng)
        is_joined = spec.concatenate > 1 and not spec.is_published  # published conversations have no system message
        systems = {index: _get_system(rows[index]) for index in chosen} if is_joined else {}
        before = (len(train), len(evaluation))
        for side, groups, weight in (("train", train, spec.weight), ("evaluation", evaluation, 1.0)):
            for taken in _passes([index for index in chosen if side_of[index] == side], weight, rng):
                groups += group(taken, spec.concatenate, config.max_images, rng, num_images.__getitem__, systems.get)
        sizes[spec.name] = (len(train) - before[0], len(evaluation) - before[1])
    sides = [_as_dataset(rows, groups, digests_of, source_of) for groups in (train, evaluation)]
    conversations = rows.select([index for indices in usable.values() for index in indices])
    return Mixture(sides[0], sides[1], reports, sizes, contents, conversations)


def _find_fault(images: list[str], contents: dict[str, ImageContent], max_images: int) -> tuple[str, list[str]]:
    """The reason to drop a conversation, if there is one, and the image that is at fault."""
    if len(images) > max_images:
        return f"more than {max_images} images", []
    return next(((contents[image].fault, [image]) for image in images if contents[image].fault), ("", []))


def _digest_text(row: dict) -> str:
    return digest_of(json.dumps(row["messages"]).encode())


def _get_system(row: dict) -> str:
    """The system message of a conversation."""
    first = row["messages"][0]
    return json.dumps(first["content"]) if first["role"] == "system" else ""


def _passes(members: list[int], weight: float, rng: random.Random) -> list[list[int]]:
    """`weight` passes, each in another order; the last one may be a part."""
    shuffled = (rng.sample(members, len(members)) for _ in range(int(weight) - 1))
    passes = [members, *shuffled] if weight >= 1 else []
    rest = round((weight - len(passes)) * len(members))
    if not passes and members:
        rest = max(rest, 1)
    return [*passes, rng.sample(members, rest)] if rest else passes


def choose(indices: Sequence[int], samples: str | int | float, rng: random.Random) -> list[int]:
    """All, a number or a share of them, in random order."""
    if samples == "all":
        count = len(indices)
    else:
        count = round(float(samples) * len(indices)) if isinstance(samples, float) and samples <= 1 else int(samples)
    return rng.sample(list(indices), min(max(count, 1), len(indices)))


Member = TypeVar("Member")


def group(
    members: Iterable[Member],
    max_members: int,
    max_images: int,
    rng: random.Random,
    count_images: Callable[[Member], int],
    get_system: Callable[[Member], Any] = lambda member: None,
) -> Iterator[list[Member]]:
    """
    Groups conversations as they come, for mixtures and streams alike: 1 to `max_members`, drawn for each group, with
    at most `max_images` images and the same system message.
    """
    current: list[Member] = []
    size = 0
    for member in members:
        if current and (
            len(current) == size
            or sum(map(count_images, current)) + count_images(member) > max_images
            or get_system(current[0]) != get_system(member)
        ):
            yield current
            current = []
        if not current:
            size = rng.randint(1, max_members)
        current.append(member)
    if current:
        yield current


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_keys(values: Any, expected: type, where: str) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"{where} is not a mapping: {values!r:.80}.")
    allowed = [entry.name for entry in fields(expected)]
    if unknown := sorted(map(str, values.keys() - set(allowed))):
        raise ValueError(f"{where} has the unknown key {', '.join(unknown)}; there are {', '.join(allowed)}.")
