"""
A training mixture: several sources, split by image, cut down to what is wanted, and grouped into longer conversations.

A mixture is one YAML file:

    data_root: data              # the folder that everything is relative to
    seed: 0                      # the same seed gives the same mixture, on any number of processes
    max_images: 8                # conversations with more are dropped, and groups never have more
    eval_share: 0.1              # of the images; no image is on both sides
    sources:
      - name: llava              # one of `SOURCES`
        samples: all             # or a number, or a share like 0.5
        concatenate: 3           # groups of 1 to 3 conversations, each used once
        weight: 1.0              # how often an epoch goes through them; 2 is twice, 0.5 half of them
      - name: mine               # conversations of your own, of a shape in record_shapes.py
        path: mine/train.jsonl   # a file (.jsonl, .json, .parquet), a folder, or a pattern like mine/*.parquet
        images: pictures         # the folder of its images; by default that of the file
      - name: theirs
        hub: user/data-set       # the same from the Hub; also `revision`, and `split` (train)

With `streaming: true` nothing is kept, see `streaming.py`.

Data flows one way: sources → split by image → samples → groups. Images are told apart by their content, so one that
lies in two places, or has two names, is one.
"""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, Features, List, Value, concatenate_datasets

from .image_contents import ImageContent, read_image_contents
from .own_sources import OwnSource, load_own_source
from .readings import SourceReport
from .sources import SOURCES, get_source, load_source


@dataclass(frozen=True)
class Ingredient(OwnSource):
    """
    What a mixture takes of a source.

    Args:
        name, path, hub, revision, split, images: See [`OwnSource`]; without path and hub, one of [`SOURCES`].
        samples (`str`, `int` or `float`, *optional*, defaults to `"all"`): How many of its conversations, or which
            share of them.
        concatenate (`int`, *optional*, defaults to 1): The most conversations in a group.
        weight (`float`, *optional*, defaults to 1.0): How often an epoch of training goes through them.
    """

    samples: str | int | float = "all"
    concatenate: int = 1
    weight: float = 1.0

    @property
    def is_published(self) -> bool:
        """Whether it is one of [`SOURCES`]."""
        return self.path is None and self.hub is None

    def __post_init__(self):
        for name in ("name", "path", "hub", "revision", "split", "images"):
            if not isinstance(value := getattr(self, name), str) and (value is not None or name in ("name", "split")):
                raise ValueError(f"{name} of the source {self.name!r} is {value!r}; use text.")
        if self.is_published:
            get_source(self.name)
            if given := [name for name in ("revision", "images") if getattr(self, name) is not None]:
                raise ValueError(f"{self.name} is a published source; it takes no {' and no '.join(given)}.")
        elif self.name in SOURCES:
            raise ValueError(f"{self.name} is the name of a published source; call yours otherwise.")
        samples: Any = self.samples
        is_share = isinstance(samples, float) and 0 < samples <= 1
        if not (samples == "all" or is_share or (_is_number(samples) and samples > 0 and int(samples) == samples)):
            raise ValueError(
                f"samples of {self.name} is {self.samples!r}; use all, a number, or a share between 0 and 1."
            )
        if not isinstance(self.concatenate, int) or isinstance(self.concatenate, bool) or self.concatenate < 1:
            raise ValueError(f"concatenate of {self.name} is {self.concatenate!r}; use a number from 1 up.")
        if not _is_number(self.weight) or not 0 < self.weight <= 100:
            raise ValueError(f"weight of {self.name} is {self.weight!r}; use a number above 0, 1 for each once.")

    def load(self, data_root: Path) -> tuple[Dataset, SourceReport]:
        """All its conversations, and what became of its records."""
        return load_source(self.name, data_root) if self.is_published else load_own_source(self, data_root)


@dataclass(frozen=True)
class Recipe:
    """
    A mixture before it is made; the fields of its YAML file.

    Args:
        sources (`tuple` of `Ingredient`): What it takes.
        seed (`int`, *optional*, defaults to 0): Of every choice.
        max_images (`int`, *optional*, defaults to 8): The most images of a conversation.
        eval_share (`float`, *optional*, defaults to 0.1): The share of the images that is kept for evaluation.
        data_root (`str`, *optional*, defaults to `"data"`): The folder under which the data sets lie.
        streaming (`bool`, *optional*, defaults to `False`): For [`stream_mixture`]: read while it is trained on.
        shuffle_buffer (`int`, *optional*, defaults to 1000): Of a stream, among how many conversations of a source the
            next one is drawn.
    """

    sources: tuple[Ingredient, ...]
    seed: int = 0
    max_images: int = 8
    eval_share: float = 0.1
    data_root: str = "data"
    streaming: bool = False
    shuffle_buffer: int = 1000

    def __post_init__(self):
        if not self.sources:
            raise ValueError("A mixture needs sources.")
        names = [ingredient.name for ingredient in self.sources]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"The mixture names {', '.join(repeated)} more than once.")
        if not isinstance(self.data_root, str):
            raise ValueError(f"data_root is {self.data_root!r}; use the path of a folder.")
        if not isinstance(self.max_images, int) or self.max_images < 1:
            raise ValueError(f"max_images is {self.max_images!r}; use a number from 1 up.")
        if not isinstance(self.shuffle_buffer, int) or self.shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer is {self.shuffle_buffer!r}; use a number from 1 up.")
        if not isinstance(self.eval_share, (int, float)) or not 0 <= self.eval_share < 1:
            raise ValueError(f"eval_share is {self.eval_share!r}; use a share from 0 to below 1.")


@dataclass
class Mixture:
    """
    Args:
        train, evaluation (`datasets.Dataset`): The two sides of the split. Each example is a group of conversations,
            read as one: `messages` (`list[dict]`), `images` (names under the data root), `where` (files and records),
            and the number `num_images`.
        reports (`list` of [`SourceReport`]): What became of the records of each source; those with too many images or
            broken ones are counted as dropped.
        sizes (`dict`): For each source its groups for training and for evaluation.
        contents (`dict` of [`ImageContent`]): Of every image by its name.
    """

    train: Dataset
    evaluation: Dataset
    reports: list[SourceReport]
    sizes: dict[str, tuple[int, int]]
    contents: dict[str, ImageContent] = field(repr=False)

    def __str__(self) -> str:
        lines = [f"{'source':<20} {'records':>9} {'dropped':>9} {'train':>9} {'eval':>9}"]
        for report in self.reports:
            train, evaluation = self.sizes[report.name]
            dropped = sum(report.dropped.values())
            lines.append(f"{report.name:<20} {report.read:>9} {dropped:>9} {train:>9} {evaluation:>9}")
        return "\n".join([*lines, f"{'all':<40} {len(self.train):>9} {len(self.evaluation):>9}"])


@dataclass
class ReadGroups:
    """Groups of conversations, from the numbers of their rows to what they hold; a transform of `datasets`."""

    rows: Dataset

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        groups = [[self.rows[row] for row in numbers] for numbers in batch["rows"]]
        return {
            "messages": [join_messages([json.loads(row["messages"]) for row in group]) for group in groups],
            "images": [[image for row in group for image in row["images"]] for group in groups],
            "where": [[row["where"] for row in group] for group in groups],
        }


def join_messages(conversations: list[list[dict]]) -> list[dict]:
    """Conversations as one; of their system messages, which are the same, the first."""
    messages = [message for conversation in conversations for message in conversation]
    return [message for index, message in enumerate(messages) if index == 0 or message["role"] != "system"]


def _as_dataset(rows: Dataset, groups: list[list[int]], num_images: list[int]) -> Dataset:
    columns = {"rows": groups, "num_images": [sum(num_images[row] for row in group) for group in groups]}
    features = Features({"rows": List(Value("int64")), "num_images": Value("int32")})
    numbers = Dataset.from_dict(columns, features=features)
    return numbers.with_transform(ReadGroups(rows), columns=["rows"], output_all_columns=True)


def read_recipe(path: str | Path) -> Recipe:
    """
    Reads the YAML file of a mixture.

    Raises:
        `FileNotFoundError`: there is none.
        `ValueError`: it is not YAML, or says something that is not known; with what is allowed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No mixture at {path}.")
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    _check_keys(values, Recipe, str(path))
    entries = values.get("sources")
    if not isinstance(entries, list):
        raise ValueError(f"{path} needs a list of sources.")
    for entry in entries:
        _check_keys(entry, Ingredient, f"A source of {path}")
        if "name" not in entry:
            raise ValueError(f"A source of {path} has no name: {entry!r}.")
    return Recipe(**{**values, "sources": tuple(Ingredient(**entry) for entry in entries)})


def load_mixture(
    recipe: Recipe | str | Path, data_root: str | Path | None = None, check_images: bool = True
) -> Mixture:
    """
    Makes a mixture.

    Args:
        recipe (`Recipe`, `str` or `Path`): The recipe, or its YAML file.
        data_root (`str` or `Path`, *optional*): The folder under which the data sets lie; by default as in the recipe.
        check_images (`bool`, *optional*, defaults to `True`): Decodes every image once, when the mixture is made for
            the first time, and drops conversations with broken ones.

    Raises:
        `ValueError`: a recipe that is not valid, or a source of which nothing is left.
        `FileNotFoundError`: the recipe, or what a source reads, is not there.
    """
    if not isinstance(recipe, Recipe):
        recipe = read_recipe(recipe)
    root = Path(data_root or recipe.data_root)
    if not root.is_dir():
        raise FileNotFoundError(f"No data root at {root}; the mixture names it as data_root, or pass another.")
    loaded = [ingredient.load(root) for ingredient in recipe.sources]
    rows = concatenate_datasets([dataset for dataset, _ in loaded])
    names = [images for dataset, _ in loaded for images in _column(dataset, "images")]
    contents = read_image_contents({image for images in names for image in images}, root, check_images)
    images = [[contents[image].digest for image in row] for row in names]
    num_images = list(map(len, images))
    fitting, start = [], 0
    for dataset, report in loaded:
        of_source = range(start, start + len(dataset))
        fitting.append(_drop_unfit(of_source, rows, names, contents, recipe.max_images, report))
        start += len(dataset)
    kept = [index for indices in fitting for index in indices]
    is_eval = split_by_image([images[index] for index in kept], recipe.eval_share, recipe.seed)
    held_out = {index for index, is_held_out in zip(kept, is_eval) if is_held_out}

    sides: tuple[list, list] = ([], [])
    sizes = {}
    for ingredient, indices in zip(recipe.sources, fitting):
        rng = random.Random(f"{recipe.seed} {ingredient.name}")
        chosen = choose(indices, ingredient.samples, rng)
        before = [len(side) for side in sides]
        for side, wanted in zip(sides, (False, True)):
            members = [index for index in chosen if (index in held_out) is wanted]
            for taken in _passes(members, 1.0 if wanted else ingredient.weight, rng):
                # One conversation has one system message.
                is_joined = ingredient.concatenate > 1 and not ingredient.is_published
                systems = [_system_of(rows[index]) for index in taken] if is_joined else None
                counts = [num_images[index] for index in taken]
                groups = group(counts, ingredient.concatenate, recipe.max_images, rng, systems)
                side += [[taken[place] for place in places] for places in groups]
        sizes[ingredient.name] = (len(sides[0]) - before[0], len(sides[1]) - before[1])
    train, evaluation = (_as_dataset(rows, side, num_images) for side in sides)
    return Mixture(train, evaluation, [report for _, report in loaded], sizes, contents)


def _drop_unfit(
    indices: range,
    rows: Dataset,
    names: list[list[str]],
    contents: dict[str, ImageContent],
    max_images: int,
    report: SourceReport,
) -> list[int]:
    """The conversations of a source that have neither too many images nor broken ones; the others are counted."""
    fitting = []
    for index in indices:
        reason = None
        if len(names[index]) > max_images:
            reason = f"more than {max_images} images"
        elif any(contents[image].is_broken for image in names[index]):
            reason = "an image that is broken, or one pixel wide or high"
        if reason is None:
            fitting.append(index)
        else:
            report.drop(rows[index]["where"], rows[index]["num_records"], reason)
    if not fitting:
        raise ValueError(f"Nothing is left of the source {report.name}.\n{report}")
    return fitting


def _system_of(row: dict) -> str:
    """The system message of a conversation."""
    first = json.loads(row["messages"])[0]
    return json.dumps(first["content"]) if first["role"] == "system" else ""


def _passes(members: list[int], weight: float, rng: random.Random) -> list[list[int]]:
    """All of them as often as the weight says, each time in another order; the last time a part."""
    passes = [members] if weight >= 1 else []
    while len(passes) + 1 <= weight:
        passes.append(rng.sample(members, len(members)))
    rest = round((weight - len(passes)) * len(members))
    if not passes and members:
        rest = max(rest, 1)
    return [*passes, rng.sample(members, rest)] if rest else passes


def split_by_image(images: Sequence[Sequence[str]], share: float, seed: int) -> list[bool]:
    """
    Which conversations are for evaluation, so that no image is on both sides.

    Conversations that share an image, directly or through others, stay together. A group of them goes to evaluation as
    long as that does not take evaluation beyond its share of the images.

    Args:
        images (`Sequence` of `Sequence` of `str`): The images of each conversation; one without any is a group alone.
        share (`float`): Of the images, or of the conversations without one.
        seed (`int`): Of the choice.
    """
    parents: dict[str, str] = {}

    def find(image: str) -> str:
        while parents.setdefault(image, image) != image:
            parents[image] = parents[parents[image]]
            image = parents[image]
        return image

    for row in images:
        for image in row[1:]:
            parents[find(image)] = find(row[0])
    members: dict[str, list[int]] = {}
    for index, row in enumerate(images):
        members.setdefault(find(row[0]) if row else f"conversation {index}", []).append(index)
    roots = list(members)
    random.Random(seed).shuffle(roots)
    sizes = {root: len({image for index in members[root] for image in images[index]}) or 1 for root in roots}
    left = share * sum(sizes.values())
    is_eval = [False] * len(images)
    for root in roots:
        if sizes[root] <= left:
            left -= sizes[root]
            for index in members[root]:
                is_eval[index] = True
    return is_eval


def choose(indices: Sequence[int], samples: str | int | float, rng: random.Random) -> list[int]:
    """All, a number or a share of them, in random order."""
    if samples == "all":
        count = len(indices)
    else:
        count = round(float(samples) * len(indices)) if isinstance(samples, float) and samples <= 1 else int(samples)
    return rng.sample(list(indices), min(max(count, 1), len(indices)))


def group(
    counts: Sequence[int], most: int, max_images: int, rng: random.Random, kinds: Sequence[str] | None = None
) -> list[list[int]]:
    """
    Runs of 1 to `most` conversations, each used once, with at most `max_images` together.

    Args:
        counts (`Sequence` of `int`): The number of images of each conversation.
        most (`int`): The most conversations in a run.
        max_images (`int`): The most images in a run.
        rng (`random.Random`): Chooses the lengths.
        kinds (`Sequence` of `str`, *optional*): Only conversations of one kind come together.
    """
    groups, start = [], 0
    while start < len(counts):
        end, wanted = start + 1, rng.randint(1, most)
        while end < min(start + wanted, len(counts)) and sum(counts[start : end + 1]) <= max_images:
            if kinds is not None and kinds[end] != kinds[start]:
                break
            end += 1
        groups.append(list(range(start, end)))
        start = end
    return groups


def _column(rows: Dataset, name: str) -> list:
    """A column as a list; much faster than row by row."""
    return rows.select_columns([name]).with_format("arrow")[:][name].to_pylist()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_keys(values: Any, kind: type, where: str) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"{where} is not a mapping: {values!r:.80}.")
    allowed = [entry.name for entry in fields(kind)]
    if unknown := sorted(map(str, values.keys() - set(allowed))):
        raise ValueError(f"{where} has the unknown key {', '.join(unknown)}; there are {', '.join(allowed)}.")
