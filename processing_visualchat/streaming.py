"""
A mixture that is read while it is trained on, for data larger than the disk: nothing is fetched before it is needed.

Sources are conversations of one's own, JSON lines or parquet, in files or on the Hub. What cannot be known before all
is read is left out: published data sets (their files are whole), shares of a source, packing by length, the doctor.
The split is by image content, image by image: a conversation whose images fall on both sides is left out. The same
seed gives the same order on any number of processes.
"""

import base64
import itertools
import json
import os
import posixpath
import random
import warnings
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import fsspec
from datasets import Features, IterableDataset, List, Value, interleave_datasets

from .image_archives import decode_image_text, digest_of, open_archive, split_archived
from .mixture import Ingredient, Recipe, join_messages, read_recipe
from .own_sources import RECORDS, find_files, find_images, split_files
from .readings import why_invalid
from .record_shapes import Messages, convert_record
from .source_converters import Dropped


FEATURES = Features({"messages": Value("large_string"), "where": List(Value("string"))})
STREAMED = (".jsonl", ".parquet")


def stream_mixture(
    recipe: Recipe | str | Path, data_root: str | Path | None = None, num_evaluation: int = 256
) -> tuple[IterableDataset, IterableDataset | None]:
    """
    Makes a stream of a mixture.

    Args:
        recipe (`Recipe`, `str` or `Path`): The recipe, or its YAML file. `weight` is how often, relative to others, a
            source comes next; every conversation comes once.
        data_root (`str` or `Path`, *optional*): The folder that paths are relative to; by default as in the recipe.
        num_evaluation (`int`, *optional*, defaults to 256): The most conversations to evaluate on.

    Returns:
        Two `datasets.IterableDataset` of examples with `messages` (JSON text), to train and to evaluate on; no second
        one if `eval_share` is 0. Each ends after one pass; `repeat()` goes on, in the same order. With `Trainer`, set
        `max_steps` and `accelerator_config={"dispatch_batches": False}`. What is left out is counted in warnings.

    Raises:
        `ValueError`: a recipe that is not valid, or that asks for what a stream cannot do.
        `FileNotFoundError`: the recipe, the data root or a file is not there.
    """
    if not isinstance(recipe, Recipe):
        recipe = read_recipe(recipe)
    sources = [(ingredient, _locate(ingredient, data_root or recipe.data_root)) for ingredient in recipe.sources]

    def stream(side: str) -> IterableDataset:
        streams = []
        for ingredient, (files, images) in sources:
            # One shard, told by a tuple, so that neither ranks nor workers take files for themselves.
            options = {
                "files": tuple(files),
                "images": images,
                "ingredient": ingredient,
                "recipe": recipe,
                "side": side,
            }
            streams.append(IterableDataset.from_generator(_generate, features=FEATURES, gen_kwargs=options))
        if side == "evaluation":
            return interleave_datasets(streams, stopping_strategy=EACH_ONCE).take(num_evaluation)
        streams = [one.shuffle(seed=recipe.seed, buffer_size=recipe.shuffle_buffer) for one in streams]
        total = sum(ingredient.weight for ingredient in recipe.sources)
        weights = [ingredient.weight / total for ingredient in recipe.sources]
        return interleave_datasets(streams, weights, seed=recipe.seed, stopping_strategy=EACH_ONCE)

    return stream("train"), stream("evaluation") if recipe.eval_share > 0 else None


EACH_ONCE = "all_exhausted_without_replacement"


def _locate(ingredient: Ingredient, data_root: str | Path) -> tuple[list[str], str | None]:
    """The addresses of the files of a source, and of the folder of its images."""
    name = ingredient.name
    if ingredient.is_published:
        raise ValueError(f"{name} is a published data set, whose files are read whole; it cannot be streamed.")
    if isinstance(ingredient.samples, float):
        raise ValueError(f"samples of {name} is a share, and how much a stream holds is not known; use a number.")
    if ingredient.hub is None:
        root = Path(os.path.abspath(data_root))
        files = [str(file) for file in find_files(ingredient, root)]
        folder = find_images(ingredient, root)
        images = None if folder is None else str(folder)
    else:
        base = f"hf://datasets/{ingredient.hub}" + (f"@{ingredient.revision}" if ingredient.revision else "")
        files = _find_on_hub(ingredient, base)
        images = None if ingredient.images is None else f"{base}/{ingredient.images}"
    if whole := [file for file in files if not file.endswith(STREAMED)]:
        raise ValueError(f"The source {name} has the file {whole[0]}; a stream reads {' or '.join(STREAMED)}.")
    return files, images


def _find_on_hub(ingredient: Ingredient, base: str) -> list[str]:
    try:
        filesystem, root = fsspec.url_to_fs(base)
        names = [file.removeprefix(f"{root}/") for file in filesystem.find(root)]
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The source {ingredient.name} cannot be found on the Hub, data set {ingredient.hub}. Is the name right, "
            f"and are you logged in if it is private or gated? {error}"
        ) from error
    if ingredient.path is not None:
        files = [name for name in names if name == ingredient.path or fnmatch(name, ingredient.path)]
    else:
        files = split_files(names).get(ingredient.split, [])
    if not files:
        raise FileNotFoundError(f"The source {ingredient.name} has no file for {ingredient.split} in {base}.")
    return [f"{base}/{file}" for file in sorted(files)]


def _generate(
    files: tuple[str, ...], images: str | None, ingredient: Ingredient, recipe: Recipe, side: str
) -> Iterator[dict]:
    """The groups of one side of a source, the files in the order given."""
    rng = random.Random(f"{recipe.seed} {ingredient.name}")
    conversations = _read(files, images, ingredient, recipe, side)
    if ingredient.samples != "all":
        conversations = itertools.islice(conversations, int(ingredient.samples))
    group: list[tuple[str, Messages]] = []
    wanted = rng.randint(1, ingredient.concatenate)
    for where, conversation in conversations:
        num_images = sum(len(member.images) for _, member in group) + len(conversation.images)
        is_other = bool(group) and group[0][1].system != conversation.system
        if group and (len(group) == wanted or num_images > recipe.max_images or is_other):
            yield _join(group)
            group, wanted = [], rng.randint(1, ingredient.concatenate)
        group.append((where, conversation))
    if group:
        yield _join(group)


def _join(group: list[tuple[str, Messages]]) -> dict:
    return {
        "messages": json.dumps(join_messages([member.messages() for _, member in group])),
        "where": [where for where, _ in group],
    }


def _read(files, images, ingredient, recipe, side) -> Iterator[tuple[str, Messages]]:
    dropped: Counter[str] = Counter()
    for file in files:
        with fsspec.open(file, "rb") as contents:
            suffix = posixpath.splitext(file)[1]
            for place, record in RECORDS[suffix](contents, file, _as_data_uri):
                outcome = record if isinstance(record, Dropped) else convert_record(record)
                if isinstance(outcome, Messages):
                    outcome = _place(outcome, images or posixpath.dirname(file), recipe)
                if isinstance(outcome, Messages):
                    found = _find_side(outcome, recipe)
                    if found == side:
                        yield f"{file}, {place}", outcome
                    if found is not None:
                        continue
                    outcome = Dropped("images of which some are to train and some to evaluate on")
                dropped[outcome.reason] += 1
                if str(dropped.total()).strip("0") == "1":  # 1, 10, 100, …
                    warnings.warn(
                        f"{ingredient.name}: {dropped.total()} records left out: {dict(dropped)}", stacklevel=2
                    )


def _as_data_uri(data: bytes, row: int, number: int) -> str:
    return f"data:image;base64,{base64.b64encode(data).decode()}"


def _place(outcome: Messages, folder: str, recipe: Recipe) -> Messages | Dropped:
    """Images with their whole addresses, in a conversation that is valid."""
    outcome = Messages(outcome.messages(), outcome.repairs)
    for block in outcome.blocks:
        if "path" in block:
            path = posixpath.normpath(block["path"])
            if path.startswith(("/", "..")):
                return Dropped("image path outside of its folder")
            block["path"] = f"{folder}/{path}"
            archived = split_archived(block["path"])
            if not folder.startswith("hf://") and not os.path.isfile(archived[0] if archived else block["path"]):
                return Dropped("an image is not there")
    if len(outcome.images) > recipe.max_images:
        return Dropped(f"more than {recipe.max_images} images")
    reason = why_invalid(outcome.turns)
    return outcome if reason is None else Dropped(reason)


def _find_side(conversation: Messages, recipe: Recipe) -> str | None:
    """Told by the content of every image (of text alone, by the text); nothing if they disagree."""
    if recipe.eval_share == 0:
        return "train"
    digests = [_digest(block) for block in conversation.blocks if block["type"] == "image"]
    digests = digests or [digest_of(str(conversation.turns).encode("utf-8", "replace"))]
    salted = (digest_of(f"{recipe.seed} {digest}".encode()) for digest in digests)
    is_eval = {int(digest, 16) < recipe.eval_share * 16 ** len(digest) for digest in salted}
    if len(is_eval) > 1:
        return None
    return "evaluation" if is_eval == {True} else "train"


def _digest(block: dict) -> str:
    if "url" in block:
        return digest_of(block["url"].encode())
    if "base64" in block:
        return digest_of(decode_image_text(block["base64"]))
    try:
        archived = split_archived(block["path"])
        if archived is not None:
            return digest_of(open_archive(archived[0])[archived[1]])
        with fsspec.open(block["path"], "rb") as file:
            return digest_of(file.read())
    except (OSError, ValueError, KeyError):  # the collator counts it as broken
        return digest_of(block["path"].encode())
