"""
Mantis-Eval: multiple choice and short answers about several images.

    id  question_type ("multi-choice" or "short-answer")  question ("… <image> …")  images  options  answer  category
"""

import re
from functools import partial
from pathlib import Path

from ..records import Example, Round, Suite
from .source import IMAGE_TAG, LETTERS, WITH_LETTER, WITH_PHRASE, RawRecord, interleave, read_records, suite_loader


COLUMNS = ("id", "question_type", "question", "images", "options", "answer", "category")


def _convert(record: RawRecord, root: Path) -> Example:
    images = [record.image(source, record.file.parent) for source in record.get("images", list)]
    question, answer, kind = record.text("question"), record.text("answer"), record.text("question_type")
    # The published evaluation puts the images that have no placeholder in front.
    question = IMAGE_TAG * (len(images) - question.count(IMAGE_TAG)) + question
    choices: tuple[str, ...] = ()
    if kind == "multi-choice":
        choices = tuple(_strip(letter, option) for letter, option in zip(LETTERS, record.options("options")))
        lines = [f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices)]
        text, reference = "\n".join([question, *lines, WITH_LETTER]), record.letter(answer, len(choices))
    elif kind == "short-answer":
        text, reference = f"{question}\n{WITH_PHRASE}", answer.strip()
    else:
        raise record.fault(f"has the question_type {kind!r}", "multi-choice or short-answer")
    rounds = (Round(interleave(record, text, images), (reference,), choices),)
    return Example(str(record.get("id", str, int)), rounds, groups={"task": kind, "category": record.text("category")})


def _strip(letter: str, option: str) -> str:
    """An option without its letter, which some have."""
    return re.sub(rf"^\s*(\({letter}\)|{letter}[.:)])\s*", "", option).strip()


MANTIS_EVAL = Suite(
    name="mantis_eval",
    description=(
        "217 questions, most of them multiple choice. For short answers, the published prompt asks for an analysis "
        "and a line 'Final Answer:', ours for a single word or phrase. License: Apache-2.0 (not verified)."
    ),
    reference="Jiang et al., Mantis, arXiv 2405.01483",
    load=suite_loader("mantis_eval", ["test-*.parquet"], _convert, partial(read_records, columns=COLUMNS)),
    metrics=("choice", "exact_match"),
    source="TIGER-Lab/Mantis-Eval",
    max_new_tokens=64,
)
