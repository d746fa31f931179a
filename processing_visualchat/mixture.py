"""
A training mixture: several sources, split by image, cut down to what is wanted, and grouped into longer conversations.

A mixture is one YAML file:

    seed: 0                      # the same seed gives the same mixture, on any number of processes
    max_images: 8                # conversations with more are dropped, and groups never have more
    eval_share: 0.1              # of the images; no image is on both sides
    sources:
      - name: llava              # one of `SOURCES`
        samples: all             # or a number, or a share like 0.5
        concatenate: 3           # groups of 1 to 3 conversations, each used once

Data flows one way: sources → split by image → samples → groups. Images are told apart by their content, so one that
lies in two places, or has two names, is one.
"""

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset, concatenate_datasets
from tqdm.auto import tqdm

from .image_archives import open_archive, split_archived
from .sources import SourceReport, get_source, load_source


@dataclass(frozen=True)
class Ingredient:
    """
    What a mixture takes of a source.

    Args:
        name (`str`): The source.
        samples (`str`, `int` or `float`, *optional*, defaults to `"all"`): How many of its conversations, or which
            share of them.
        concatenate (`int`, *optional*, defaults to 1): The most conversations in a group.
    """

    name: str
    samples: str | int | float = "all"
    concatenate: int = 1

    def __post_init__(self):
        get_source(self.name)
        samples: Any = self.samples
        is_number = isinstance(samples, (int, float)) and not isinstance(samples, bool)
        is_share = isinstance(samples, float) and 0 < samples <= 1
        if not (samples == "all" or is_share or (is_number and samples > 0 and int(samples) == samples)):
            raise ValueError(
                f"samples of {self.name} is {self.samples!r}; use all, a number, or a share between 0 and 1."
            )
        if not isinstance(self.concatenate, int) or isinstance(self.concatenate, bool) or self.concatenate < 1:
            raise ValueError(f"concatenate of {self.name} is {self.concatenate!r}; use a number from 1 up.")


@dataclass(frozen=True)
class Recipe:
    """
    A mixture before it is made; the fields of its YAML file.

    Args:
        sources (`tuple` of `Ingredient`): What it takes.
        seed (`int`, *optional*, defaults to 0): Of every choice.
        max_images (`int`, *optional*, defaults to 8): The most images of a conversation.
        eval_share (`float`, *optional*, defaults to 0.1): The share of the images that is kept for evaluation.
    """

    sources: tuple[Ingredient, ...]
    seed: int = 0
    max_images: int = 8
    eval_share: float = 0.1

    def __post_init__(self):
        if not self.sources:
            raise ValueError("A mixture needs sources.")
        names = [ingredient.name for ingredient in self.sources]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"The mixture names {', '.join(repeated)} more than once.")
        if not isinstance(self.max_images, int) or self.max_images < 1:
            raise ValueError(f"max_images is {self.max_images!r}; use a number from 1 up.")
        if not isinstance(self.eval_share, (int, float)) or not 0 <= self.eval_share < 1:
            raise ValueError(f"eval_share is {self.eval_share!r}; use a share from 0 to below 1.")


class MixedConversations(torch.utils.data.Dataset):
    """
    Groups of conversations, each read as one.

    Args:
        rows (`datasets.Dataset`): The conversations, memory-mapped.
        groups (`list` of `list` of `int`): The rows of each group.
    """

    def __init__(self, rows: Dataset, groups: list[list[int]]):
        self.rows, self.groups = rows, groups

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`messages` (`list[dict]`), `images` (names under the data root) and `where` (files and records)."""
        rows = [self.rows[row] for row in self.groups[index]]
        return {
            "messages": [message for row in rows for message in json.loads(row["messages"])],
            "images": [image for row in rows for image in row["images"]],
            "where": [row["where"] for row in rows],
        }


@dataclass
class Mixture:
    """
    Args:
        train, evaluation ([`MixedConversations`]): The two sides of the split.
        reports (`list` of [`SourceReport`]): What became of the records of each source; those with too many images are
            counted as dropped.
        sizes (`dict`): For each source its groups for training and for evaluation.
    """

    train: MixedConversations
    evaluation: MixedConversations
    reports: list[SourceReport]
    sizes: dict[str, tuple[int, int]]

    def __str__(self) -> str:
        lines = [f"{'source':<20} {'records':>9} {'dropped':>9} {'train':>9} {'eval':>9}"]
        for report in self.reports:
            train, evaluation = self.sizes[report.name]
            dropped = sum(report.dropped.values())
            lines.append(f"{report.name:<20} {report.read:>9} {dropped:>9} {train:>9} {evaluation:>9}")
        return "\n".join([*lines, f"{'all':<40} {len(self.train):>9} {len(self.evaluation):>9}"])


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


def load_mixture(recipe: Recipe | str | Path, data_root: str | Path) -> Mixture:
    """
    Makes a mixture.

    Args:
        recipe (`Recipe`, `str` or `Path`): The recipe, or its YAML file.
        data_root (`str` or `Path`): The folder under which the data sets lie.

    Raises:
        `ValueError`: a recipe that is not valid, or a source of which nothing is left.
        `FileNotFoundError`: the recipe, or what a source reads, is not there.
    """
    if not isinstance(recipe, Recipe):
        recipe = read_recipe(recipe)
    loaded = [load_source(ingredient.name, data_root) for ingredient in recipe.sources]
    rows = concatenate_datasets([dataset for dataset, _ in loaded])
    contents = _fingerprints(rows, Path(data_root))
    images = [[contents[image] for image in row] for row in rows["images"]]
    is_eval = split_by_image(images, recipe.eval_share, recipe.seed)

    sides: tuple[list, list] = ([], [])
    sizes, start = {}, 0
    for ingredient, (dataset, report) in zip(recipe.sources, loaded):
        indices = range(start, start + len(dataset))
        start += len(dataset)
        fitting = [index for index in indices if len(images[index]) <= recipe.max_images]
        _count_dropped(report, rows, sorted({*indices} - {*fitting}), recipe.max_images)
        rng = random.Random(f"{recipe.seed} {ingredient.name}")
        chosen = choose(fitting, ingredient.samples, rng)
        before = [len(side) for side in sides]
        for side, wanted in zip(sides, (False, True)):
            members = [index for index in chosen if is_eval[index] is wanted]
            counts = [len(images[index]) for index in members]
            groups = group(counts, ingredient.concatenate, recipe.max_images, rng)
            side += [[members[place] for place in places] for places in groups]
        sizes[ingredient.name] = (len(sides[0]) - before[0], len(sides[1]) - before[1])
    train, evaluation = (MixedConversations(rows, side) for side in sides)
    return Mixture(train, evaluation, [report for _, report in loaded], sizes)


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
    return rng.sample(list(indices), min(count, len(indices)))


def group(counts: Sequence[int], most: int, max_images: int, rng: random.Random) -> list[list[int]]:
    """
    Runs of 1 to `most` conversations, each used once, with at most `max_images` together.

    Args:
        counts (`Sequence` of `int`): The number of images of each conversation.
        most (`int`): The most conversations in a run.
        max_images (`int`): The most images in a run.
        rng (`random.Random`): Chooses the lengths.
    """
    groups, start = [], 0
    while start < len(counts):
        end, wanted = start + 1, rng.randint(1, most)
        while end < min(start + wanted, len(counts)) and sum(counts[start : end + 1]) <= max_images:
            end += 1
        groups.append(list(range(start, end)))
        start = end
    return groups


def _count_dropped(report: SourceReport, rows: Dataset, indices: list[int], max_images: int) -> None:
    reason = f"more than {max_images} images"
    for index in indices:
        count = rows[index]["num_records"]
        report.used -= count
        report.conversations -= 1
        report.dropped[reason] = report.dropped.get(reason, 0) + count
        report.examples.setdefault(reason, rows[index]["where"])


def _check_keys(values: Any, kind: type, where: str) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"{where} is not a mapping: {values!r:.80}.")
    allowed = [entry.name for entry in fields(kind)]
    if unknown := sorted(map(str, values.keys() - set(allowed))):
        raise ValueError(f"{where} has the unknown key {', '.join(unknown)}; there are {', '.join(allowed)}.")


def _fingerprints(rows: Dataset, data_root: Path) -> dict[str, str]:
    """What tells each image's content from another's; read once, and kept by `datasets`."""
    names = sorted({image for images in rows["images"] for image in images})
    root = data_root.resolve()
    digest = hashlib.blake2b(digest_size=16)
    for name in names:
        archived = split_archived(name)
        status = (root / (archived[0] if archived else name)).stat()
        digest.update(str((name, status.st_size, status.st_mtime_ns)).encode())
    options = {"root": str(root), "names": names, "key": digest.hexdigest()}
    contents = Dataset.from_generator(_generate_fingerprints, gen_kwargs=options) if names else ()
    return {row["name"]: row["content"] for row in contents}


def _generate_fingerprints(root: str, names: list[str], key: str) -> Iterator[dict[str, str]]:
    for name in tqdm(names, desc="Telling images apart", unit="image"):
        archived = split_archived(name)
        if archived is None:
            data = (Path(root) / name).read_bytes()
        else:
            data = open_archive(f"{root}/{archived[0]}")[archived[1]]
        yield {"name": name, "content": hashlib.blake2b(data, digest_size=16).hexdigest()}
