"""
Reads a whole mixture before a GPU is rented, and says what is wrong with it.

    python -m processing_visualchat.doctor examples/configs/small_mixture.yaml --data_root data --model CHECKPOINT

For every source: how many records were read, used, repaired and dropped, each by reason, with file and record. Of the
conversations: tokens, images and rounds, what is too long, what packing saves. Of the images: broken ones, duplicates,
and whether any is on both sides of the split. The first conversations are drawn as a person would see them, with what
the loss is on marked. All of it is printed and written as one page (`report.html`), with a line for every dropped
record (`dropped.jsonl`).

Without `--model` there is no tokenizer to count with: a word or a punctuation mark counts as one token, and an image
as 256. The exit status is 1 if a source cannot be read or an image is on both sides; with `--strict` also if any
record was dropped; and 2 if there is nothing to read.
"""

import contextlib
import json
import os
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, RawDescriptionHelpFormatter
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoProcessor, CLIPImageProcessor, PreTrainedTokenizerFast

from .data_collator import DataCollatorForVisualChat
from .image_archives import decode_image_text
from .image_contents import ImageContent
from .mixture import Ingredient, Mixture, Recipe, load_mixture, read_recipe
from .packing import Waste, batching_table, compare_batching, measure_lengths
from .processing_visualchat import IGNORE_INDEX, VisualChatProcessor
from .readings import SourceReport


QUANTITIES = {"length": "tokens", "num_images": "images", "num_rounds": "rounds"}
MANY = 20_000  # conversations; with fewer, starting processes costs more than it saves
ESTIMATED_IMAGE_LENGTH = 256  # tokens, as a vision tower of 14-pixel patches on 224 by 224 pixels yields


@dataclass
class Sample:
    """
    A finished conversation as the model gets it.

    Args:
        where (`list` of `str`): Files and records.
        pieces (`list` of `(text, is_learned)`): Its text, and whether the loss is on it; `<image>` for an image.
        images (`list`): What its images are read from, in order.
        num_tokens, num_learned (`int`): Tokens, and those with a loss.
    """

    where: list[str]
    pieces: list[tuple[str, bool]]
    images: list[Any]
    num_tokens: int
    num_learned: int


@dataclass
class Diagnosis:
    """
    What [`examine`] finds.

    Args:
        name (`str`): The mixture.
        reports (`list` of [`SourceReport`]): Of each source that can be read.
        failures (`dict`): Why a source cannot be read, by its name.
        sides (`dict` of `datasets.Dataset`): `train` and `evaluation`, measured.
        sizes (`dict`): For each source its conversations on the two sides.
        contents (`dict` of [`ImageContent`]): Every image by its name.
        leaked (`list` of `list` of `str`): Names of the same image, of which some are on either side.
        duplicates (`list` of `list` of `str`): Names of the same image.
        max_length (`int`): The most tokens of a conversation.
        batching (`dict` of [`Waste`]): What batches lose, by the way they are made.
        samples (`list` of [`Sample`]): The first conversations.
        is_estimated (`bool`): Whether tokens were counted without the model's tokenizer.
    """

    name: str
    reports: list[SourceReport]
    failures: dict[str, str]
    sides: dict[str, Dataset]
    sizes: dict[str, tuple[int, int]]
    contents: dict[str, ImageContent]
    leaked: list[list[str]]
    duplicates: list[list[str]]
    max_length: int
    batching: dict[str, Waste]
    samples: list[Sample]
    is_estimated: bool

    @property
    def problems(self) -> list[str]:
        """What has to be mended before training."""
        unreadable = [f"{name} cannot be read: {reason}" for name, reason in self.failures.items()]
        empty = [] if len(self.sides["train"]) else ["there is no conversation to train on"]
        return unreadable + empty + [f"on both sides of the split: {', '.join(names)}" for names in self.leaked]

    @property
    def num_dropped(self) -> int:
        """Records that were dropped, of all sources."""
        return sum(sum(report.dropped.values()) for report in self.reports)

    @property
    def num_broken(self) -> int:
        """Images that cannot be used."""
        return sum(content.is_broken for content in self.contents.values())

    def lengths(self, quantity: str, side: str) -> np.ndarray:
        """A column of a side: `length`, `num_images` or `num_rounds`."""
        return np.asarray(self.sides[side].with_format(None)[quantity][:], dtype=np.int64)

    def source_table(self) -> list[Sequence]:
        """Records and conversations of each source."""
        rows: list[Sequence] = [("source", "read", "used", "repaired", "dropped", "train", "evaluation")]
        for report in self.reports:
            counts = (report.read, report.used, report.num_repaired, sum(report.dropped.values()))
            rows.append((report.name, *counts, *self.sizes[report.name]))
        columns = list(zip(*(row[1:] for row in rows[1:])))
        return [*rows, ("all", *map(sum, columns))] if columns else rows

    def reason_table(self) -> list[Sequence]:
        """Why records were dropped or repaired, with the first one."""
        rows: list[Sequence] = [("source", "what", "records", "reason", "as in")]
        for report in self.reports:
            for what, reasons in (("dropped", report.dropped), ("repaired", report.repaired)):
                for reason, count in sorted(reasons.items(), key=lambda item: -item[1]):
                    rows.append((report.name, what, count, reason, report.examples[reason][0]))
        return rows

    def length_table(self) -> list[Sequence]:
        """Tokens, images and rounds of the conversations of each side, and of each source."""
        rows: list[Sequence] = [("a conversation's", "of", "least", "median", "mean", "90%", "most")]
        for quantity, name in QUANTITIES.items():
            for side in self.sides:
                rows += _summarize(name, side, self.lengths(quantity, side))
            start = 0
            for source, (num_train, _) in self.sizes.items():
                rows += _summarize(name, f"  {source}", self.lengths(quantity, "train")[start : start + num_train])
                start += num_train
        return rows

    def findings(self) -> list[str]:
        """What to know, in sentences."""
        num_images = len({content.digest for content in self.contents.values()})
        lengths = self.lengths("length", "train")
        too_long = int((lengths > self.max_length).sum())
        spare = sum(map(len, self.duplicates)) - len(self.duplicates)
        counted = ", counted as words and marks, 256 for an image (no --model)" if self.is_estimated else ""
        return [
            f"{len(self.sides['train'])} conversations to train on, {lengths.sum()} tokens{counted}.",
            f"{len(self.contents)} image names, {num_images} different images; {self.num_broken} cannot be used.",
            f"{spare} image names are duplicates of others, by content" + _name_some(self.duplicates),
            f"{len(self.leaked)} images are on both sides of the split" + _name_some(self.leaked),
            f"{too_long} conversations to train on have more than {self.max_length} tokens; --overlong of "
            "finetune.py says what becomes of them.",
            f"{self.num_dropped} records are dropped"
            + (", each with its reason in dropped.jsonl." if self.num_dropped else "."),
        ]

    def __str__(self) -> str:
        parts = [
            self.name,
            format_table(self.source_table()),
            format_table(self.reason_table()) if len(self.reason_table()) > 1 else "",
            format_table(self.length_table()),
            format_table(batching_table(self.batching)),
            "\n".join(self.findings()),
            "\n".join(f"PROBLEM: {problem}" for problem in self.problems),
        ]
        return "\n\n".join(part for part in parts if part)

    def write(self, folder: str | Path) -> Path:
        """Writes `report.html` and `dropped.jsonl` into a folder, and returns the page."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "dropped.jsonl").open("w") as lines:
            for report in self.reports:
                for where, reason in report.list_dropped():
                    lines.write(json.dumps({"source": report.name, "where": where, "reason": reason}) + "\n")
        from .doctor_report import write_page  # draws with matplotlib, which reading does not need

        return write_page(self, folder / "report.html")


def examine(
    recipe: Recipe | str | Path,
    data_root: str | Path | None = None,
    processor: VisualChatProcessor | None = None,
    max_length: int = 4096,
    batch_size: int = 8,
    num_samples: int = 5,
    check_images: bool = True,
) -> Diagnosis:
    """
    Reads everything that a mixture consists of.

    Args:
        recipe (`Recipe`, `str` or `Path`): The mixture, or its YAML file; or a file or folder of conversations.
        data_root (`str` or `Path`, *optional*): The folder under which the data sets lie; by default as in the recipe.
        processor (`VisualChatProcessor`, *optional*): That of the model; without one, tokens are estimated.
        max_length (`int`, *optional*, defaults to 4096): The most tokens of a conversation, and of a pack.
        batch_size (`int`, *optional*, defaults to 8): Conversations of the padded batches that packs are compared to.
        num_samples (`int`, *optional*, defaults to 5): How many conversations to draw.
        check_images (`bool`, *optional*, defaults to `True`): Decodes every image.

    Raises:
        `ValueError`: a recipe that is not valid, or of which no source can be read.
        `FileNotFoundError`: no recipe, or no data root.
    """
    name = "The mixture" if isinstance(recipe, Recipe) else str(recipe)
    if not isinstance(recipe, Recipe):
        recipe, data_root = _read_recipe(Path(recipe), data_root)
    root = Path(data_root or recipe.data_root)
    if not root.is_dir():
        raise FileNotFoundError(f"No data root at {root}; the mixture names it as data_root, or pass another.")
    mixture, failures = _load_what_can_be_read(recipe, root, check_images)
    for report in mixture.reports:
        if report.read != report.used + sum(report.dropped.values()):
            raise RuntimeError(f"Not every record of {report.name} is accounted for: {report}")
    is_estimated = processor is None
    processor = processor or make_estimating_processor()
    max_length = min(max_length, processor.tokenizer.model_max_length)
    sides = {
        side: measure_lengths(dataset, processor, os.cpu_count() if len(dataset) > MANY else None)
        for side, dataset in (("train", mixture.train), ("evaluation", mixture.evaluation))
    }
    duplicates, leaked = compare_images(mixture)
    train = sides["train"].with_format(None)
    return Diagnosis(
        name=name,
        reports=mixture.reports,
        failures=failures,
        sides=sides,
        sizes=mixture.sizes,
        contents=mixture.contents,
        leaked=leaked,
        duplicates=duplicates,
        max_length=max_length,
        batching=compare_batching(train["length"][:], train["num_images"][:], max_length, batch_size),
        samples=_draw_samples(mixture, processor, num_samples),
        is_estimated=is_estimated,
    )


def _load_what_can_be_read(recipe: Recipe, root: Path, check_images: bool) -> tuple[Mixture, dict[str, str]]:
    """The mixture of the sources that can be read, and why others cannot: one run finds all that is missing."""
    failures: dict[str, str] = {}

    def keep(load: Callable[[Ingredient], object]) -> Recipe:
        for ingredient in recipe.sources:
            try:
                if ingredient.name not in failures:
                    load(ingredient)
            except (ValueError, OSError) as error:
                failures[ingredient.name] = str(error)
        readable = tuple(ingredient for ingredient in recipe.sources if ingredient.name not in failures)
        if not readable:
            raise ValueError("No source can be read.\n" + "\n".join(failures.values()))
        return replace(recipe, sources=readable)

    readable = keep(lambda ingredient: ingredient.load(root))
    try:
        return load_mixture(readable, root, check_images), failures
    except ValueError:  # of some source nothing is left once its images are looked at
        readable = keep(lambda one: load_mixture(replace(recipe, sources=(one,)), root, check_images))
        return load_mixture(readable, root, check_images), failures


def compare_images(mixture: Mixture) -> tuple[list[list[str]], list[list[str]]]:
    """Names of the same image; and those of them that are on both sides of the split."""
    names = defaultdict(set)
    for name, content in mixture.contents.items():
        names[content.digest].add(name)
    sides: list[set[str]] = []
    for dataset in (mixture.train, mixture.evaluation):
        sides.append({image for example in dataset for image in example["images"]})
    digests = [{mixture.contents[name].digest for name in side} for side in sides]
    duplicates = [sorted(same) for same in names.values() if len(same) > 1]
    leaked = [sorted(names[digest] & (sides[0] | sides[1])) for digest in sorted(digests[0] & digests[1])]
    return sorted(duplicates), leaked


def _first_of_each(mixture: Mixture, most: int) -> list[int]:
    """The first conversations to train on, those of every source in turn."""
    ends = np.cumsum([num_train for num_train, _ in mixture.sizes.values()]).tolist()
    ranges = [range(start, end) for start, end in zip([0, *ends], ends)]
    turns = (indices[turn] for turn in range(most) for indices in ranges if turn < len(indices))
    return list(islice(turns, most))


def _draw_samples(mixture: Mixture, processor: VisualChatProcessor, most: int) -> list[Sample]:
    """Of the first conversations those that can be collated; the others are counted elsewhere."""
    samples = []
    for index in _first_of_each(mixture, most):
        with contextlib.suppress(ValueError):
            samples.append(draw_sample(mixture.train[index], processor))
    return samples


def draw_sample(example: dict, processor: VisualChatProcessor) -> Sample:
    """
    What becomes of a conversation on its way through processor and collator.

    Raises:
        `ValueError`: it cannot be collated: too long for the model, without an answer, or with a broken image.
    """
    batch = DataCollatorForVisualChat(processor, max_broken=0)([example])
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    text: Any = processor.apply_chat_template(example["messages"])
    encoded = processor.tokenizer(text, return_offsets_mapping=True, verbose=False)
    pieces: list[tuple[str, bool]] = []
    place, end = 0, 0
    tokens: Any = zip(encoded["input_ids"], encoded["offset_mapping"])
    for token, (start, stop) in tokens:
        is_learned = labels[place] != IGNORE_INDEX
        shown = text[end:stop].replace(processor.image_token, "<image>") if start >= end else ""
        if pieces and pieces[-1][1] == is_learned:
            pieces[-1] = (pieces[-1][0] + shown, is_learned)
        else:
            pieces.append((shown, is_learned))
        end = max(end, stop)
        place += processor.image_seq_length if token == processor.image_token_id else 1
    images = [
        decode_image_text(block["base64"]) if "base64" in block else block.get("path") or block["url"]
        for message in example["messages"]
        for block in (message["content"] if not isinstance(message["content"], str) else ())
        if block["type"] == "image"
    ]
    return Sample(example["where"], pieces, images, len(ids), sum(label != IGNORE_INDEX for label in labels))


def make_estimating_processor() -> VisualChatProcessor:
    """A processor that needs no checkpoint: one token a word or punctuation mark, 256 an image."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<pad>": 1, "</s>": 2, "<image>": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), "removed", invert=True)
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="</s>",
        extra_special_tokens=["<image>"],
    )
    size = {"height": 32, "width": 32}
    image_processor = CLIPImageProcessor(size=size, crop_size=size)
    return VisualChatProcessor(image_processor, fast, image_seq_length=ESTIMATED_IMAGE_LENGTH)


def format_table(rows: Sequence[Sequence]) -> str:
    """Columns of equal width, numbers to the right."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts)]
    is_number = [any(isinstance(cell, (int, float)) for cell in column) for column in zip(*rows)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width) for cell, width, right in zip(row, widths, is_number)
        ).rstrip()
        for row in texts
    )


def _summarize(name: str, group: str, values: np.ndarray) -> list[Sequence]:
    if len(values) == 0:
        return []
    median, tenth = np.percentile(values, [50, 90])
    return [
        (name, group, int(values.min()), int(median), round(float(values.mean()), 1), int(tenth), int(values.max()))
    ]


def _name_some(groups: list[list[str]], most: int = 3) -> str:
    if not groups:
        return "."
    return (
        ": " + "; ".join(" = ".join(names[:most]) for names in groups[:most]) + ("; …" if len(groups) > most else "")
    )


def _read_recipe(path: Path, data_root: str | Path | None) -> tuple[Recipe, str | Path | None]:
    """A YAML file as it is; a file or folder of conversations as a mixture of that alone."""
    if path.is_dir() or path.suffix in (".jsonl", ".json", ".parquet"):
        whole = Path(os.path.abspath(path))  # and not where a link leads
        source = Ingredient(str(whole), whole.name)
        return Recipe((source,), eval_share=0.0, max_images=sys.maxsize), whole.parent
    return read_recipe(path), data_root


def positive_number(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """The description as it is written, and every default."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = ArgumentParser("python -m processing_visualchat.doctor", None, __doc__, formatter_class=HelpFormatter)
    parser.add_argument("mixture", help="YAML file of a mixture; or conversations: .jsonl, .json, .parquet, a folder")
    parser.add_argument("--data_root", help="the folder under which the data sets lie; else as the mixture says")
    parser.add_argument("--model", help="checkpoint whose processor counts the tokens")
    parser.add_argument(
        "--max_length", type=positive_number, default=4096, help="the most tokens of a conversation and of a pack"
    )
    parser.add_argument(
        "--batch_size", type=positive_number, default=8, help="of the padded batches that packs are compared to"
    )
    parser.add_argument("--samples", type=positive_number, default=5, help="how many conversations to draw")
    parser.add_argument("--skip_images", action="store_true", help="do not decode every image")
    parser.add_argument("--output", default="visualchat-doctor", help="folder for report.html and dropped.jsonl")
    parser.add_argument("--strict", action="store_true", help="a record that is dropped is an error")
    options = parser.parse_args(arguments)
    try:
        diagnosis = examine(
            options.mixture,
            options.data_root,
            AutoProcessor.from_pretrained(options.model) if options.model else None,
            options.max_length,
            options.batch_size,
            options.samples,
            not options.skip_images,
        )
    except (ValueError, OSError) as error:
        print(f"doctor: error: {error}", file=sys.stderr)
        return 2
    print(diagnosis)
    try:
        print(f"\nThe page: {diagnosis.write(options.output)}")
    except ImportError as error:
        print(f"doctor: no page is drawn without matplotlib ({error}): pip install matplotlib", file=sys.stderr)
    except OSError as error:
        print(f"doctor: error: the page cannot be written: {error}", file=sys.stderr)
        return 2
    if options.strict and diagnosis.num_dropped:
        print(f"doctor: {diagnosis.num_dropped} records are dropped, and --strict allows none", file=sys.stderr)
        return 1
    return 1 if diagnosis.problems else 0


if __name__ == "__main__":
    sys.exit(main())
