"""
A mixture that is read during training, for data larger than the disk: nothing is downloaded before it is needed.

A stream reads custom datasets as JSON lines, parquet, Arrow or WebDataset, from files or the Hub. What requires all
data to be read first is refused: published datasets, `samples` as a share, and a `weight` that is not a whole number.

The split is a rule for one image at a time: a hash of its content (of the text, for a conversation without images) is
below `eval_share` or not, so every image is on one side. A conversation with images on both sides is left out.
"""

import itertools
import os
import random
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import fsspec
from datasets import Features, IterableDataset, Json, List, Value, interleave_datasets

from ..processing_visualchat import VisualChatProcessor
from .conversation import Conversation, Dropped, join_messages
from .custom import find_files, find_images, group_by_split
from .files import digest_of, suffix_of
from .mixture import DatasetSpec, MixtureConfig, group, read_mixture_config
from .readers import read_conversations
from .tables import counted


FEATURES = Features({"messages": Json(), "where": List(Value("string")), "source": Value("string")})
STREAMED = (".jsonl", ".parquet", ".arrow", ".tar")
EACH_ONCE = "all_exhausted_without_replacement"


def stream_mixture(
    config: MixtureConfig | str | Path,
    data_root: str | Path | None = None,
    num_evaluation: int = 256,
    processor: VisualChatProcessor | None = None,
) -> tuple[IterableDataset, IterableDataset | None]:
    """
    Streams a mixture.

    Args:
        config, data_root: As for [`load_mixture`]; a number of `samples` are the first ones, and sources take turns at
            random, by `weight`.
        num_evaluation (`int`, *optional*, defaults to 256): Maximum examples for evaluation.
        processor (`VisualChatProcessor`, *optional*): As for [`load_mixture`].

    Returns:
        Two `datasets.IterableDataset` of examples with `messages`, `where` and `source` (the name of the dataset), for
        training and for evaluation; `None` for the second if `eval_share` is 0. Each ends after one epoch; `repeat()`
        continues in the same order, which is the same on any number of processes. With `Trainer`, set `max_steps` and
        `accelerator_config={"dispatch_batches": False}`. Left out conversations are counted in warnings.

    Raises:
        `ValueError`: an invalid configuration, or a key that a stream cannot honor.
        `FileNotFoundError`: the configuration, the data root or a file does not exist.
    """
    if not isinstance(config, MixtureConfig):
        config = read_mixture_config(config)
    tokens = () if processor is None else processor.control_tokens
    located = [_locate(spec, data_root or config.data_root) for spec in config.sources]

    def stream(side: str) -> IterableDataset:
        streams = []
        for spec, (files, images) in zip(config.sources, located):
            # Bound to its files, which ranks and workers would otherwise divide among themselves.
            generate = SourceStream(spec, config, files, images, side, tokens).generate
            streams.append(IterableDataset.from_generator(generate, features=FEATURES))
        if side == "evaluation":
            return interleave_datasets(streams, stopping_strategy=EACH_ONCE).take(num_evaluation)
        streams = [one.shuffle(seed=config.seed, buffer_size=config.shuffle_buffer) for one in streams]
        total = sum(spec.weight for spec in config.sources)
        weights = [spec.weight / total for spec in config.sources]
        return interleave_datasets(streams, weights, seed=config.seed, stopping_strategy=EACH_ONCE)

    return stream("train"), stream("evaluation") if config.eval_share > 0 else None


def _locate(spec: DatasetSpec, data_root: str | Path) -> tuple[list[str], str | None]:
    """The paths or URLs of the files of a dataset, and of its image folder."""
    if spec.is_published:
        raise ValueError(f"{spec.name} is a published dataset, whose files are read whole; it cannot be streamed.")
    if isinstance(spec.samples, float):
        raise ValueError(f"samples of {spec.name} is a share, and the size of a stream is unknown; use a number.")
    if spec.weight != int(spec.weight):
        raise ValueError(
            f"weight of {spec.name} is {spec.weight}, and a part of a stream of unknown size cannot be read; use a "
            "whole number of passes."
        )
    if spec.hub is None:
        root = Path(os.path.abspath(data_root))
        files, images = [str(file) for file in find_files(spec, root)], find_images(spec, root)
    else:
        base = f"hf://datasets/{spec.hub}" + (f"@{spec.revision}" if spec.revision else "")
        files = _find_on_hub(spec, base)
        images = spec.images and (spec.images if os.path.isabs(spec.images) else f"{base}/{spec.images}")
    for file in files:
        if suffix_of(file) not in STREAMED:
            raise ValueError(f"The source {spec.name} has the file {file}; a stream reads {' or '.join(STREAMED)}.")
    return files, images


def _find_on_hub(spec: DatasetSpec, base: str) -> list[str]:
    try:
        filesystem, root = fsspec.url_to_fs(base)
        names = [file.removeprefix(f"{root}/") for file in filesystem.find(root)]
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The source {spec.name} cannot be found on the Hub, dataset {spec.hub}. Is the name right, and are you "
            f"logged in if it is private or gated? {error}"
        ) from error
    if spec.path is not None:
        files = [name for name in names if name == spec.path or fnmatch(name, spec.path)]
    else:
        files = group_by_split(names).get(spec.split, [])
    if not files:
        raise FileNotFoundError(f"The source {spec.name} has no file for {spec.split} in {base}.")
    return [f"{base}/{file}" for file in sorted(files)]


@dataclass(frozen=True)
class SourceStream:
    """One side of a dataset."""

    spec: DatasetSpec
    config: MixtureConfig
    files: list[str]
    images: str | None  # the image folder
    side: str
    control_tokens: tuple[str, ...]  # no text may hold one

    def generate(self) -> Iterator[dict]:
        """The groups, in the order of the files, once per pass."""
        rng = random.Random(f"{self.config.seed} {self.spec.name}")
        for _ in range(int(self.spec.weight) if self.side == "train" else 1):
            count, system = (lambda member: len(member[1].images)), (lambda member: member[1].system)
            members = self._read_side()
            for joined in group(members, self.spec.concatenate, self.config.max_images, rng, count, system):
                messages = join_messages([conversation.messages() for _, conversation in joined])
                yield {"messages": messages, "where": [where for where, _ in joined], "source": self.spec.name}

    def _read_side(self) -> Iterator[tuple[str, Conversation]]:
        """The conversations of the side, of the first `samples` of both; what is left out is counted in warnings."""
        dropped: Counter[str] = Counter()

        def drop(reason: str) -> None:
            dropped[reason] += 1
            if str(dropped.total()).strip("0") == "1":  # 1, 10, 100, …
                warnings.warn(
                    f"{self.spec.name}: {counted(dropped.total(), 'record')} left out: {dict(dropped)}", stacklevel=2
                )

        def read() -> Iterator[tuple[str, Conversation]]:
            options: dict = {"columns": self.spec.columns, "control_tokens": self.control_tokens}
            read = partial(read_conversations, image_root=self.images, embed=True, **options)
            records = map(read, self.files)
            for record in itertools.chain.from_iterable(records):
                if isinstance(record.outcome, Dropped):
                    drop(record.outcome.reason)
                elif len(record.outcome.images) > self.config.max_images:
                    drop(f"more than {self.config.max_images} images")
                else:
                    yield record.where, record.outcome

        samples = self.spec.samples
        for where, conversation in itertools.islice(read(), None if samples == "all" else int(samples)):
            found = find_side(conversation, self.config)
            if found == self.side:
                yield where, conversation
            elif found is None:
                drop("images on both sides of the split")


def find_side(conversation: Conversation, config: MixtureConfig) -> str | None:
    """The side of a conversation by the content of its images, or of its text; `None` if its images disagree."""
    if config.eval_share == 0:
        return "train"
    digests = {image.digest() for image in conversation.images}
    digests = digests or {digest_of(str(conversation.messages()).encode("utf-8", "replace"))}
    salted = (digest_of(f"{config.seed} {digest}".encode()) for digest in digests)
    sides = {"evaluation" if int(text, 16) < config.eval_share * 16 ** len(text) else "train" for text in salted}
    return sides.pop() if len(sides) == 1 else None
