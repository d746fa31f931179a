"""
Reads a whole mixture before a GPU is rented, and reports what is wrong with it.

    python -m processing_visualchat.doctor examples/configs/small_mixture.yaml --data_root data --model CHECKPOINT

A verdict comes first: whether the mixture is fit to train on, and why not. For every dataset: its share of the tokens,
and how many records were read, used, repaired and dropped, by reason, with file and record. For the conversations:
tokens, images and rounds, over-length and repeated ones, steps per epoch, and what packing saves. For the images:
broken ones, duplicates by their pixels, and any that is on both sides of the split. The first conversations of every
dataset are shown as the model gets them, with the loss marked. The report is printed and written as one page
(`report.html`), and every dropped record as a line of `dropped.jsonl`.

Without `--model` there is no tokenizer: a word or a punctuation mark counts as one token, an image as 256. The exit
status is 1 if a dataset cannot be read or an image is on both sides, with `--strict` also if a conversation is
over-length, a file repeats another or any record was dropped, and 2 if there is nothing to read.
"""

import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence

from transformers import AutoProcessor

from ..data.tables import counted
from .diagnosis import examine
from .report import write_report


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
    parser.add_argument("--data_root", help="folder that contains the datasets; by default as configured")
    parser.add_argument("--model", help="checkpoint whose processor counts the tokens")
    for name, default, text in (
        ("--max_length", 4096, "maximum tokens of a conversation and of a pack"),
        ("--batch_size", 8, "conversations per padded batch, to compare with packs"),
        ("--samples", 5, "number of conversations to show, at least one of each dataset"),
    ):
        parser.add_argument(name, type=positive_number, default=default, help=text)
    parser.add_argument("--skip_images", action="store_true", help="do not decode every image")
    parser.add_argument("--output", default="visualchat-doctor", help="folder for report.html and dropped.jsonl")
    parser.add_argument("--strict", action="store_true", help="treat every problem and dropped record as an error")
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
        print(f"\nThe page: {write_report(diagnosis, options.output)}")
    except ImportError as error:
        print(f"doctor: matplotlib is needed for the page ({error}): pip install matplotlib", file=sys.stderr)
    except OSError as error:
        print(f"doctor: error: the page cannot be written: {error}", file=sys.stderr)
        return 2
    if options.strict and (diagnosis.num_dropped or diagnosis.problems):
        dropped = counted(diagnosis.num_dropped, "record is dropped", "records are dropped")
        found = counted(len(diagnosis.problems), "problem")
        print(f"doctor: {dropped}, {found} found, and --strict allows none", file=sys.stderr)
        return 1
    return 1 if diagnosis.errors else 0


if __name__ == "__main__":
    sys.exit(main())
