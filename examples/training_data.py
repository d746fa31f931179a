"""The training and evaluation data of `finetune.py`: files, folders, mixtures and streams, measured and packed."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from training_arguments import FinetuneError
from transformers import TrainingArguments

from processing_visualchat import (
    DatasetSpec,
    MixtureConfig,
    load_conversations,
    load_mixture,
    measure_lengths,
    pack_conversations,
    pack_stream,
    read_mixture_config,
    stream_mixture,
)
from processing_visualchat.data.custom import find_splits
from processing_visualchat.data.files import suffix_of
from processing_visualchat.data.lengths import list_overlong
from processing_visualchat.data.published import SOURCES
from processing_visualchat.data.tables import counted


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
    digests: set[str] | None
    sources: list[DataSource]


def load_data(arguments, training_arguments: TrainingArguments, collator) -> TrainingData:
    """The training data, packed or measured if the arguments ask for it, and the evaluation data or `None`."""
    if arguments.mixture is not None:
        data = load_mixture_file(arguments, training_arguments, collator.processor)
    else:
        data = load_files(arguments, collator.processor)
    return TrainingData(
        pack_or_measure(data.train, arguments, training_arguments, collator),
        limit_evaluation(data.evaluation, arguments, collator),
        data.digests if arguments.check_images else None,
        data.sources,
    )


def load_files(arguments, processor) -> TrainingData:
    """The data of `--train_file` and `--eval_file`."""
    train_dataset, digests = load_file(arguments.train_file, arguments, processor, ["train"])
    sources = [DataSource(Path(arguments.train_file).name, len(train_dataset))]
    if arguments.eval_file is None:
        return TrainingData(train_dataset, None, digests, sources)
    eval_dataset, _ = load_file(arguments.eval_file, arguments, processor, ["validation", "test"])
    sources.append(DataSource(Path(arguments.eval_file).name, None, len(eval_dataset)))
    return TrainingData(train_dataset, eval_dataset, digests, sources)


def load_mixture_file(arguments, training_arguments: TrainingArguments, processor) -> TrainingData:
    """Both sides of a mixture; a stream repeats without end, so that a resumed run finds its place."""
    config = read_mixture_config(arguments.mixture)
    if not config.streaming:
        mixture = load_mixture(config, arguments.data_root, arguments.check_images, processor)
        sources = [describe_source(spec, *mixture.sizes[spec.name]) for spec in config.sources]
        return TrainingData(*report_mixture(mixture), sources)
    if training_arguments.max_steps <= 0:
        raise FinetuneError("a stream has no known length; set the number of steps with --max_steps")
    training_arguments.accelerator_config.dispatch_batches = False  # batches differ in shape
    train_dataset, eval_dataset = stream_mixture(config, arguments.data_root, processor=processor)
    return TrainingData(train_dataset.repeat(None), eval_dataset, None, [*map(describe_source, config.sources)])


def describe_source(spec: DatasetSpec, num_train: int | None = None, num_eval: int | None = None) -> DataSource:
    """A data set of a mixture with its terms, which are known of published ones."""
    if spec.is_published:
        source = SOURCES[spec.name]
        return DataSource(spec.name, num_train, num_eval, source.homepage, source.license, source.attribution)
    url = f"https://huggingface.co/datasets/{spec.hub}" if spec.hub else ""
    return DataSource(spec.name, num_train, num_eval, url)


def report_mixture(mixture) -> tuple:
    """Prints the ingestion reports once, and returns both sides and the digests of the training images."""
    print_once("\n".join(map(str, [*mixture.reports, mixture])))
    images = {image for batch in mixture.train.iter(1000) for row in batch["images"] for image in row}
    digests = {mixture.contents[image].digest for image in images}
    return mixture.train, mixture.evaluation if len(mixture.evaluation) else None, digests


def load_file(name: str, arguments, processor, splits: list[str]) -> tuple:
    """
    Conversations of a file or folder, and the digests of their images. In JSON lines every fault is an error,
    elsewhere faults are counted.
    """
    path = Path(name)
    images = arguments.image_root and os.path.abspath(arguments.image_root)
    if suffix_of(name) == ".jsonl" or not path.exists():
        dataset = load_conversations(path, processor, arguments.check_images, images)
        return dataset, {digest for row in dataset["digests"] for digest in row}
    path = Path(os.path.abspath(path))  # keeps links, whose targets may have other names
    source = DatasetSpec(str(path), path.name, split=choose_split(path, splits), images=images)
    config = MixtureConfig((source,), eval_share=0.0, max_images=sys.maxsize)
    dataset, _, digests = report_mixture(load_mixture(config, path.parent, arguments.check_images, processor))
    return dataset, digests


def choose_split(path: Path, wanted: list[str]) -> str:
    """The first wanted split that a folder has, or its only split."""
    if not path.is_dir():
        return "train"
    found = find_splits(path)
    splits = [split for split in wanted if split in found] or list(found)
    if not found or (len(splits) > 1 and splits[0] not in wanted):
        raise FinetuneError(f"{path} has no data for {' or '.join(wanted)}; it has {', '.join(found) or 'no data'}")
    return splits[0]


def pack_or_measure(dataset, arguments, training_arguments: TrainingArguments, collator):
    """Packs conversations, or measures their lengths if batches are made by length, or none may be over-length."""
    is_stream = isinstance(dataset, torch.utils.data.IterableDataset)
    seed = training_arguments.seed if training_arguments.data_seed is None else training_arguments.data_seed
    if is_stream and arguments.packing:
        return pack_stream(dataset, collator.processor, collator.limit, seed=seed)
    is_by_length = arguments.packing or training_arguments.train_sampling_strategy in SAMPLING_BY_LENGTH
    if is_stream or not (is_by_length or arguments.overlong == "error"):
        return dataset
    dataset = measure_lengths(dataset, collator.processor)
    refuse_overlong(dataset, arguments, collator)
    if not arguments.packing:
        return dataset
    packs = pack_conversations(dataset, collator.limit, seed=seed)
    print_once(
        f"{counted(len(dataset), 'conversation')} in {counted(len(packs), 'pack')} of up to {collator.limit} tokens"
    )
    return packs


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


def print_once(text: str) -> None:
    """Prints in the first process only."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(text)
