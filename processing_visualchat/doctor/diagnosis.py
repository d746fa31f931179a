"""The examination of a mixture: its numbers, and the problems to fix before training."""

import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
from datasets import Dataset

from ..data.files import digest_of, suffix_of
from ..data.ingestion import split_place
from ..data.lengths import list_overlong, measure_lengths
from ..data.mixture import DatasetSpec, Mixture, MixtureConfig, load_mixture, read_mixture_config
from ..data.packing import BatchingStatistics, batching_table, compare_batching
from ..data.readers import RECORDS
from ..data.tables import Row, counted, format_table
from ..processing_visualchat import VisualChatProcessor
from .samples import Sample, draw_samples, make_estimating_processor


QUANTITIES = {"length": "tokens", "num_images": "images", "num_rounds": "rounds"}
NUM_NAMED = 20  # over-length conversations and broken images
MANY = 20_000  # conversations; with fewer, starting processes takes longer than it saves


@dataclass
class Diagnosis:
    """The result of [`examine`]."""

    name: str  # of the mixture
    mixture: Mixture
    failures: dict[str, str]  # reasons of unreadable datasets, by name
    sides: dict[str, Dataset]  # `train` and `evaluation`, measured
    leaked: list[list[str]]  # references to the same image, on both sides of the split
    duplicates: list[list[str]]  # references to the same image
    repeats: list[list[str]]  # files and records of the same conversation
    is_checked: bool  # images were decoded
    max_length: int  # tokens of a conversation
    batch_size: int
    batching: dict[str, BatchingStatistics]  # by strategy
    samples: list[Sample]  # the first conversations of each source
    is_estimated: bool  # tokens were counted without the model's tokenizer

    @property
    def errors(self) -> list[str]:
        """What makes the mixture unfit to train on."""
        unreadable = [f"{name} cannot be read: {reason}" for name, reason in self.failures.items()]
        empty = [] if len(self.sides["train"]) else ["there is no conversation to train on"]
        return unreadable + empty + [f"on both sides of the split: {', '.join(names)}" for names in self.leaked]

    @property
    def problems(self) -> list[str]:
        """All problems to fix before training; those that are not errors need a decision."""
        overlong = []
        for side in self.sides:
            number, names = self.list_overlong(side, 3)
            if number:
                named = "; ".join(names) + ("; …" if number > len(names) else "")
                overlong.append(
                    f"{counted(number, f'{side} conversation has', f'{side} conversations have')} more than "
                    f"{self.max_length:,} tokens ({named}). "
                    "Set --overlong of finetune.py, which refuses them by default."
                )
        return [*self.errors, *overlong, *self.list_copies()]

    @property
    def verdict(self) -> str:
        """Whether the mixture is fit to train on."""
        if self.errors:
            return "Not fit to train on"
        return "Fit to train on, after a decision" if self.problems else "Fit to train on"

    def list_overlong(self, side: str, count: int = NUM_NAMED) -> tuple[int, list[str]]:
        """The number of over-length conversations of a side, and the first names."""
        return list_overlong(self.sides[side], self.max_length, count)

    def list_copies(self) -> list[str]:
        """Files most of whose conversations another file has too, as one beside its copy in another format."""
        sizes = Counter(split_place(where)[0] for where in self.mixture.conversations["where"])
        pairs: Counter[tuple[str, str]] = Counter()
        for places in self.repeats:
            pairs.update(combinations(sorted({split_place(where)[0] for where in places}), 2))
        return [
            f"{copy} repeats {file}: {counted(count, 'conversation is', 'conversations are')} in both, and trained on "
            "twice."
            for (file, copy), count in pairs.items()
            if 2 * count > min(sizes[file], sizes[copy])
        ]

    def list_broken(self) -> dict[str, str]:
        """Why images cannot be used, by their names."""
        lines = (line for report in self.mixture.reports for line in report.list_dropped())
        return {line["image"]: line["reason"] for line in lines if line["image"]}

    @property
    def num_dropped(self) -> int:
        """Records that were dropped, of all datasets."""
        return sum(report.num_dropped for report in self.mixture.reports)

    def lengths(self, quantity: str, side: str) -> np.ndarray:
        """A column of a side: `length`, `num_images` or `num_rounds`."""
        return np.asarray(self.sides[side].with_format(None)[quantity][:], dtype=np.int64)

    def reason_table(self) -> list[Row]:
        """The reasons why records were dropped or repaired, each with the first record."""
        rows: list[Row] = [("source", "action", "records", "reason", "first")]
        for report in self.mixture.reports:
            rows += [(report.name, *reason) for reason in report.reasons()]
        return rows

    def share_table(self) -> list[Row]:
        """The conversations of each dataset for training, and its tokens, which are what a mixture is about."""
        rows: list[Row] = [("source", "share", "tokens", "trained", "conversations", "images", "evaluation")]
        total = max(int(self.lengths("length", "train").sum()), 1)
        start = 0
        for source, (num_train, num_evaluation) in self.mixture.sizes.items():
            sums = [
                int(self.lengths(name, "train")[start : start + num_train].sum())
                for name in ("length", "num_trained", "num_images")
            ]
            rows.append((source, f"{sums[0] / total:.1%}", *sums[:2], num_train, sums[2], num_evaluation))
            start += num_train
        return rows

    def length_table(self) -> list[Row]:
        """Tokens, images and rounds of the conversations of each side, and of each dataset."""
        rows: list[Row] = [("per conversation", "of", "minimum", "median", "mean", "90%", "maximum")]
        for quantity, name in QUANTITIES.items():
            for side in self.sides:
                rows += _summarize(name, side, self.lengths(quantity, side))
            start = 0
            for source, (num_train, _) in self.mixture.sizes.items():
                rows += _summarize(name, f"  {source}", self.lengths(quantity, "train")[start : start + num_train])
                start += num_train
        return rows

    def findings(self) -> list[str]:
        """The most important numbers, in sentences."""
        contents = self.mixture.contents.values()
        num_images = len({content.digest for content in contents})
        lengths, trained = (self.lengths(name, "train") for name in ("length", "num_trained"))
        note = " Tokens are words and marks, 256 for an image (no --model)." if self.is_estimated else ""
        content = "pixels" if self.is_checked else "bytes, as they were not opened (--skip_images)"
        spare, repeated = (sum(map(len, same)) - len(same) for same in (self.duplicates, self.repeats))
        padded, packed = (
            self.batching[name].batches if self.batching else 0 for name in ("random order, padded", "packed")
        )
        return [
            f"{counted(len(lengths), 'conversation')} to train on, {counted(lengths.sum(), 'token')}, "
            f"{trained.sum():,} of them trained on.{note}",
            f"Steps per epoch of one process: {counted(padded, 'padded batch', 'padded batches')} of "
            f"{self.batch_size}, or {counted(packed, 'pack')} of "
            f"{self.max_length:,} tokens.",
            f"{counted(len(contents), 'image name')}, {counted(num_images, 'different image')}; "
            f"{len(self.list_broken()):,} cannot be used.",
            counted(spare, "image name is a duplicate", "image names are duplicates")
            + f" of others, by their {content}{_name_some(self.duplicates)}",
            counted(repeated, "conversation repeats another", "conversations repeat others")
            + _name_some(self.repeats),
            counted(len(self.leaked), "image is", "images are")
            + f" on both sides of the split{_name_some(self.leaked)}",
            counted(self.num_dropped, "record is dropped", "records are dropped")
            + (", each with its reason in dropped.jsonl." if self.num_dropped else "."),
        ]

    def __str__(self) -> str:
        """The report as text."""
        records = [self.mixture.source_table(), self.reason_table(), self.length_table()]
        tables = [*records, batching_table(self.batching), self.share_table()]
        parts = [self.name, *(format_table(table) for table in tables if len(table) > 1), "\n".join(self.findings())]
        problems = (f"PROBLEM: {problem}" for problem in self.problems)
        return "\n\n".join([*parts, "\n".join([*problems, f"{self.verdict}."])])


def examine(
    config: MixtureConfig | str | Path,
    data_root: str | Path | None = None,
    processor: VisualChatProcessor | None = None,
    max_length: int = 4096,
    batch_size: int = 8,
    num_samples: int = 5,
    check_images: bool = True,
) -> Diagnosis:
    """
    Reads all data of a mixture, or of a file or folder of conversations; the options are those of the command line.
    Without a processor, tokens are estimated.
    """
    name = "The mixture" if isinstance(config, MixtureConfig) else str(config)
    if not isinstance(config, MixtureConfig):
        config, data_root = _read_config(Path(config), data_root)
    root = config.find_root(data_root)
    is_estimated = processor is None
    processor = processor or make_estimating_processor()
    mixture, failures = _load_readable(config, root, check_images, processor)
    for report in mixture.reports:
        if report.read != report.used + report.num_dropped:
            raise RuntimeError(f"Not every record of {report.name} is accounted for: {report}")
    max_length = min(max_length, processor.tokenizer.model_max_length)
    sides = {"train": mixture.train, "evaluation": mixture.evaluation}
    for side, dataset in sides.items():
        sides[side] = measure_lengths(dataset, processor, os.cpu_count() if len(dataset) > MANY else None)
    duplicates, leaked = compare_images(mixture)
    train = sides["train"].with_format(None)
    return Diagnosis(
        name=name,
        mixture=mixture,
        failures=failures,
        sides=sides,
        leaked=leaked,
        duplicates=duplicates,
        repeats=find_repeats(mixture),
        is_checked=check_images,
        max_length=max_length,
        batch_size=batch_size,
        batching=compare_batching(
            train["length"][:], train["num_images"][:], max_length, batch_size, images=train["digests"][:]
        ),
        samples=draw_samples(mixture, processor, num_samples),
        is_estimated=is_estimated,
    )


def _load_readable(
    config: MixtureConfig, root: Path, check_images: bool, processor: VisualChatProcessor
) -> tuple[Mixture, dict[str, str]]:
    """The mixture of the readable datasets, and why others are not: one run finds everything that is missing."""
    failures: dict[str, str] = {}

    def keep(load: Callable[[DatasetSpec], object]) -> MixtureConfig:
        for spec in config.sources:
            try:
                if spec.name not in failures:
                    load(spec)
            except (ValueError, OSError) as error:
                failures[spec.name] = str(error)
        readable = tuple(spec for spec in config.sources if spec.name not in failures)
        if not readable:
            raise ValueError("No source can be read.\n" + "\n".join(failures.values()))
        return replace(config, sources=readable)

    readable = keep(lambda spec: spec.load(root, processor.control_tokens))
    try:
        return load_mixture(readable, root, check_images, processor), failures
    except ValueError:  # a dataset in which no conversation has usable images
        readable = keep(lambda spec: load_mixture(replace(config, sources=(spec,)), root, check_images, processor))
        return load_mixture(readable, root, check_images, processor), failures


def compare_images(mixture: Mixture) -> tuple[list[list[str]], list[list[str]]]:
    """References to the same image; and those of them that are on both sides of the split."""
    names = defaultdict(set)
    for name, content in mixture.contents.items():
        names[content.digest].add(name)
    sides = [{name for example in side for name in example["images"]} for side in (mixture.train, mixture.evaluation)]
    train, evaluation = ({mixture.contents[name].digest for name in side} for side in sides)
    duplicates = [sorted(same) for same in names.values() if len(same) > 1]
    leaked = [sorted(names[digest] & set.union(*sides)) for digest in sorted(train & evaluation)]
    return sorted(duplicates), leaked


def find_repeats(mixture: Mixture) -> list[list[str]]:
    """Files and records of conversations with the same text and the same images."""
    places = defaultdict(list)
    for row in mixture.conversations:
        text = [(message["role"], [*map(_get_text, message["content"])]) for message in row["messages"]]
        images = [mixture.contents[name].digest for name in row["images"]]
        places[digest_of(json.dumps([text, images]).encode())].append(row["where"])
    return [same for same in places.values() if len(same) > 1]


def _get_text(block: str | dict) -> str | None:
    """A letter or a block of text; `None` for an image."""
    return block if isinstance(block, str) else block.get("text")


def _summarize(name: str, group: str, values: np.ndarray) -> list[Row]:
    if len(values) == 0:
        return []
    low, median, tenth, high = np.percentile(values, [0, 50, 90, 100]).astype(int).tolist()
    return [(name, group, low, median, round(float(values.mean()), 1), tenth, high)]


def _name_some(groups: list[list[str]], count: int = 3) -> str:
    if not groups:
        return "."
    named = "; ".join(" = ".join(names[:count]) + (" = …" if len(names) > count else "") for names in groups[:count])
    return f": {named}" + ("; …" if len(groups) > count else ".")


def _read_config(path: Path, data_root: str | Path | None) -> tuple[MixtureConfig, str | Path | None]:
    """A YAML file as it is; a file or folder of conversations as a mixture of one dataset."""
    if path.is_dir() or suffix_of(path.name) in RECORDS:
        absolute = Path(os.path.abspath(path))  # without following links
        spec = DatasetSpec(str(absolute), absolute.name)
        return MixtureConfig((spec,), eval_share=0.0, max_images=sys.maxsize), absolute.parent
    return read_mixture_config(path), data_root
