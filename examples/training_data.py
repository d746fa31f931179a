"""The training and evaluation data of `finetune.py`: files, folders, mixtures and streams, measured and packed."""

import os
import random
import sys
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from training_arguments import FinetuneError
from transformers import TrainingArguments

from processing_visualchat import (
    DatasetSpec,
    ImageGroupedDataset,
    MixtureConfig,
    load_conversations,
    load_mixture,
    measure_lengths,
    pack_conversations,
    pack_stream,
    read_mixture_config,
    stream_mixture,
)
from processing_visualchat.data.custom import find_files, find_splits
from processing_visualchat.data.files import suffix_of
from processing_visualchat.data.grouping import read_digests
from processing_visualchat.data.lengths import list_overlong
from processing_visualchat.data.packing import BatchingStatistics, batching_table, measure_batches, plan_packs
from processing_visualchat.data.published import SOURCES
from processing_visualchat.data.tables import counted, format_table


SAMPLING_BY_LENGTH = ("group_by_length", "batch_rebalance")  # of TrainingArguments.train_sampling_strategy


@dataclass(frozen=True)
class DataSource:
    """A data set of a training run, for its model card; what is not known is `None` or empty."""

    name: str
    num_train: int | None = None  # conversations, in an epoch
    num_eval: int | None = None
    url: str = ""
    license: str = ""  # as its authors state it
    attribution: str = ""


class TrainingData(NamedTuple):
    """Both sides of the data, the digests of the training images if they were opened, and the data sets."""

    train: Any
    evaluation: Any
    sources: list[DataSource]
    digests: set[str] | None = None


def load_data(
    arguments, training_arguments: TrainingArguments, collator, computes_images_once: bool = False
) -> TrainingData:
    """
    The training data, packed, grouped by image or measured if the arguments ask for it, and the evaluation data or
    `None`.

    `computes_images_once` says whether the decoder of the model does that for the equal images of a batch.
    """
    if arguments.mixture is not None:
        data = load_mixture_file(arguments, training_arguments, collator.processor)
    else:
        data = load_files(arguments, collator.processor)
    digests = None
    if arguments.check_images and isinstance(data.train, Dataset):
        digests = {digest for shown in read_digests(data.train) for digest in shown}
    shared_length = collator.processor.image_seq_length if computes_images_once else 0
    train_dataset = arrange(data.train, arguments, training_arguments, collator, shared_length)
    return TrainingData(train_dataset, limit_evaluation(data.evaluation, arguments, collator), data.sources, digests)


def load_files(arguments, processor) -> TrainingData:
    """The data of `--train_file` and `--eval_file`."""
    train_dataset = load_file(arguments.train_file, arguments, processor, ["train"])
    sources = [DataSource(Path(arguments.train_file).name, len(train_dataset))]
    if arguments.eval_file is None:
        return TrainingData(train_dataset, None, sources)
    eval_dataset = load_file(arguments.eval_file, arguments, processor, ["validation", "test"])
    sources.append(DataSource(Path(arguments.eval_file).name, None, len(eval_dataset)))
    return TrainingData(train_dataset, eval_dataset, sources)


def load_mixture_file(arguments, training_arguments: TrainingArguments, processor) -> TrainingData:
    """Both sides of a mixture; a stream repeats without end, so that a resumed run finds its place."""
    config = read_mixture_config(arguments.mixture)
    if not config.streaming:
        mixture = load_mixture(config, arguments.data_root, arguments.check_images, processor)
        report_mixture(mixture)
        sources = [describe_source(spec, *mixture.sizes[spec.name]) for spec in config.sources]
        return TrainingData(mixture.train, mixture.evaluation if len(mixture.evaluation) else None, sources)
    if training_arguments.max_steps <= 0:
        raise FinetuneError("a stream has no known length; set the number of steps with --max_steps")
    if arguments.group_by_image:
        raise FinetuneError("--group_by_image has to see all data first; set streaming: false in the mixture")
    training_arguments.accelerator_config.dispatch_batches = False  # batches differ in shape
    train_dataset, eval_dataset = stream_mixture(config, arguments.data_root, processor=processor)
    return TrainingData(train_dataset.repeat(None), eval_dataset, [*map(describe_source, config.sources)])


def describe_source(spec: DatasetSpec, num_train: int | None = None, num_eval: int | None = None) -> DataSource:
    """A data set of a mixture with its terms, which are known of published ones."""
    if spec.is_published:
        source = SOURCES[spec.name]
        return DataSource(spec.name, num_train, num_eval, source.homepage, source.license, source.attribution)
    url = f"https://huggingface.co/datasets/{spec.hub}" if spec.hub else ""
    return DataSource(spec.name, num_train, num_eval, url)


def report_mixture(mixture) -> None:
    """Prints the ingestion reports once."""
    print_once("\n".join(map(str, [*mixture.reports, mixture])))


def load_file(name: str, arguments, processor, splits: list[str]) -> Dataset:
    """Conversations of a file or folder. In JSON lines every fault is an error, elsewhere faults are counted."""
    path = Path(name)
    images = arguments.image_root and os.path.abspath(arguments.image_root)
    if suffix_of(name) == ".jsonl" or not path.exists():
        return load_conversations(path, processor, arguments.check_images, images)
    path = Path(os.path.abspath(path))  # keeps links, whose targets may have other names
    source = DatasetSpec(str(path), path.name, split=choose_split(path, splits), images=images)
    config = MixtureConfig((source,), eval_share=0.0, max_images=sys.maxsize)
    mixture = load_mixture(config, path.parent, arguments.check_images, processor)
    report_mixture(mixture)
    return mixture.train


def list_files(arguments) -> dict[str, Path]:
    """The local files of the training records, by a name that does not depend on the folder that they are in."""
    if arguments.mixture is None:
        path = Path(arguments.train_file)
        files = find_splits(path)[choose_split(path, ["train"])] if path.is_dir() else [path]
        return {str(file.relative_to(path if path.is_dir() else path.parent)): file for file in files if file.exists()}
    config = read_mixture_config(arguments.mixture)
    specs = [spec for spec in config.sources if spec.hub is None]
    root = Path(os.path.abspath(config.find_root(arguments.data_root))) if specs else Path()
    files = []
    for spec in specs:
        files += (
            [root / name for name in SOURCES[spec.name].annotations] if spec.is_published else find_files(spec, root)
        )
    return {str(file.relative_to(root)): file for file in files if file.exists()}


def choose_split(path: Path, wanted: list[str]) -> str:
    """The first wanted split that a folder has, or its only split."""
    if not path.is_dir():
        return "train"
    found = find_splits(path)
    splits = [split for split in wanted if split in found] or list(found)
    if not found or (len(splits) > 1 and splits[0] not in wanted):
        raise FinetuneError(f"{path} has no data for {' or '.join(wanted)}; it has {', '.join(found) or 'no data'}")
    return splits[0]


def arrange(dataset, arguments, training_arguments: TrainingArguments, collator, shared_length: int):
    """
    Packs conversations and groups them by image, or measures their lengths if batches are made by length, or none may
    be over-length.
    """
    is_stream = isinstance(dataset, torch.utils.data.IterableDataset)
    seed = training_arguments.seed if training_arguments.data_seed is None else training_arguments.data_seed
    if is_stream and arguments.packing:
        return pack_stream(dataset, collator.processor, collator.limit, seed=seed)
    is_arranged = arguments.packing or arguments.group_by_image
    is_by_length = training_arguments.train_sampling_strategy in SAMPLING_BY_LENGTH
    if is_stream or not (is_arranged or is_by_length or arguments.overlong == "error"):
        return dataset
    measured = dataset = measure_lengths(dataset, collator.processor)
    refuse_overlong(dataset, arguments, collator)
    limits = {"shared_length": shared_length, "max_per_image": arguments.max_per_image}
    if arguments.packing:
        dataset = pack_conversations(
            measured, collator.limit, seed=seed, group_by_image=arguments.group_by_image, **limits
        )
        print_once(
            f"{counted(len(measured), 'conversation')} in {counted(len(dataset), 'pack')} of up to {collator.limit} "
            "tokens"
        )
    if not arguments.group_by_image:
        return dataset
    training_arguments.train_sampling_strategy = "sequential"  # the dataset has the order of each epoch
    num_batches = training_arguments.gradient_accumulation_steps * training_arguments.world_size
    batch_size = training_arguments.train_batch_size
    grouped = ImageGroupedDataset(dataset, batch_size, num_batches, arguments.max_per_image, seed)
    if is_first_process():
        print(format_table(batching_table(compare_grouping(grouped, measured, collator, shared_length))))
    return grouped


def compare_grouping(
    grouped: ImageGroupedDataset, measured: Dataset, collator, shared_length: int
) -> dict[str, BatchingStatistics]:
    """The batches of an epoch in random order, and grouped by image in the first epoch."""
    lengths, num_images = (np.asarray(measured.with_format(None)[name][:]) for name in ("length", "num_images"))
    if collator.packing:
        packs = grouped.dataset.with_format(None)["members"][:]
        random_order = plan_packs(lengths, num_images, collator.limit, seed=grouped.seed)
    else:
        packs = [[index] for index in range(len(lengths))]
        random_order = random.Random(grouped.seed).sample(packs, len(packs))
    statistics = {}
    for name, rows in {"random order": random_order, "by image": [packs[index] for index in grouped.order]}.items():
        slices = (rows[start : start + grouped.batch_size] for start in range(0, len(rows), grouped.batch_size))
        batches = [list(chain.from_iterable(members)) for members in slices]
        statistics[name] = measure_batches(
            lengths, num_images, batches, not collator.packing, read_digests(measured), shared_length
        )
    return statistics


def refuse_overlong(dataset, arguments, collator) -> None:
    """Ends the run before its first step, if the collator would end it at an over-length conversation."""
    number, names = list_overlong(dataset, collator.limit)
    if number and arguments.overlong == "error":
        raise FinetuneError(
            f"{number:,} of {len(dataset):,} conversations have more than {collator.limit:,} tokens: "
            f"{'; '.join(names)}{'; …' if number > len(names) else ''}. Set --overlong to drop_first_rounds, "
            "drop_last_rounds or skip, or raise --max_length"
        )


def limit_evaluation(dataset, arguments, collator):
    """Evaluation data without the conversations that the collator would skip: an empty batch has no loss."""
    if arguments.overlong not in ("skip", "error") or not isinstance(dataset, Dataset):
        return dataset
    measured = measure_lengths(dataset, collator.processor)
    refuse_overlong(measured, arguments, collator)
    lengths = measured["length"][:]
    kept = [index for index, length in enumerate(lengths) if length <= collator.limit]
    if not kept:
        raise FinetuneError(f"every evaluation conversation has more than {collator.limit} tokens")
    return dataset.select(kept)


def is_first_process() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def print_once(text: str) -> None:
    """Prints in the first process only."""
    if is_first_process():
        print(text)
