"""What `finetune.py` trains and evaluates on: files, folders, mixtures and streams; measured and packed."""

import os
import sys
from pathlib import Path

import torch
from transformers import TrainingArguments

from processing_visualchat import (
    DatasetSpec,
    MixtureConfig,
    load_conversations,
    load_mixture,
    measure_lengths,
    pack_conversations,
    read_mixture_config,
    stream_mixture,
)
from processing_visualchat.data.custom import find_splits


BY_LENGTH = ("group_by_length", "batch_rebalance")  # of TrainingArguments.train_sampling_strategy


def load_data(arguments, training_arguments: TrainingArguments, processor) -> tuple:
    """The data to train on, and to evaluate on if there is any."""
    if arguments.mixture is not None:
        recipe = read_mixture_config(arguments.mixture)
        if recipe.streaming:
            if training_arguments.max_steps <= 0:
                raise SystemExit("finetune.py: error: a stream has no known length; say when to end with --max_steps")
            training_arguments.accelerator_config.dispatch_batches = False  # batches differ in their shapes
            train_dataset, eval_dataset = stream_mixture(recipe, arguments.data_root)
            return train_dataset.repeat(None), eval_dataset  # without an end, or a resume would lose its place
        return show(load_mixture(recipe, arguments.data_root, arguments.check_images))
    train_dataset = load_file(Path(arguments.train_file), arguments, processor, ["train"])
    if arguments.eval_file is None:
        return train_dataset, None
    return train_dataset, load_file(Path(arguments.eval_file), arguments, processor, ["validation", "test"])


def show(mixture) -> tuple:
    """Its two sides, after saying what became of its records."""
    if int(os.environ.get("RANK", 0)) == 0:
        print("\n".join(map(str, [*mixture.reports, mixture])))
    return mixture.train, mixture.evaluation if len(mixture.evaluation) else None


def load_file(path: Path, arguments, processor, splits: list[str]):
    """Conversations of one file or folder: of JSON lines every fault is an error, of others it is counted."""
    if path.suffix == ".jsonl" or not path.exists():
        check_length = arguments.overlong == "error"
        return load_conversations(path, processor, arguments.max_length, arguments.check_images, check_length)
    whole = Path(os.path.abspath(path))  # and not where a link leads
    source = DatasetSpec(str(whole), whole.name, split=choose_split(whole, splits))
    recipe = MixtureConfig((source,), eval_share=0.0, max_images=sys.maxsize)
    return show(load_mixture(recipe, whole.parent, arguments.check_images))[0]


def choose_split(path: Path, wanted: list[str]) -> str:
    """Of a folder the first split of those wanted, or the only one there is."""
    if not path.is_dir():
        return "train"
    found = find_splits(path)
    splits = [split for split in wanted if split in found] or list(found)
    if not found or (len(splits) > 1 and splits[0] not in wanted):
        raise SystemExit(
            f"finetune.py: error: {path} has no data for {' or '.join(wanted)}; it has {', '.join(found) or 'no data'}"
        )
    return splits[0]


def arrange(dataset, arguments, training_arguments: TrainingArguments, collator):
    """Packs conversations, or measures them where batches are made by length."""
    is_stream = isinstance(dataset, torch.utils.data.IterableDataset)  # its batches are packed as they come
    if is_stream or not (arguments.packing or training_arguments.train_sampling_strategy in BY_LENGTH):
        return dataset
    dataset = measure_lengths(dataset, collator.processor)
    if not arguments.packing:
        return dataset
    seed = training_arguments.seed if training_arguments.data_seed is None else training_arguments.data_seed
    packs = pack_conversations(dataset, collator.limit, seed=seed)
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"{len(dataset)} conversations in {len(packs)} packs of up to {collator.limit} tokens")
    return packs


def leave_out_overlong(dataset, arguments, collator):
    """Conversations to evaluate on, those left out that the collator would skip: batches of nothing have no loss."""
    if arguments.overlong != "skip" or not hasattr(dataset, "column_names") or not hasattr(dataset, "select"):
        return dataset
    lengths = measure_lengths(dataset, collator.processor)["length"][:]
    kept = [index for index, length in enumerate(lengths) if length <= collator.limit]
    if not kept:
        raise SystemExit(f"finetune.py: error: every conversation to evaluate on is beyond {collator.limit} tokens")
    return dataset.select(kept)
