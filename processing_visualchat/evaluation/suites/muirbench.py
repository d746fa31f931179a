"""
MuirBench: multiple choice about 2 to 9 images, each question with a variant that has no answer among its options.

    idx  task  image_relation  image_type  question ("… <image> …")  options  answer ("B")  image_list
"""

from functools import partial
from pathlib import Path

from ..records import Example, Round, Suite
from .source import IMAGE_TAG, LETTERS, RawRecord, interleave, name_images, read_records, suite_loader


COLUMNS = ("idx", "task", "image_relation", "image_type", "question", "options", "answer", "image_list")
# The published prompt, in eval/utils/preprocess.py.
HINT = "Hint: Please provide the correct option letter, such as A, B, C, D, directly.\nAnswer:"


def _convert(record: RawRecord, root: Path) -> Example:
    images = [record.image(source, record.file.parent) for source in record.get("image_list", list)]
    question, options = record.text("question"), record.options("options")
    lines = [f"({letter}) {option}" for letter, option in zip(LETTERS, options)]
    text = "\n".join([f"Question: {question}", "Choices:", *lines, HINT])
    content = interleave(record, text, images, is_free=True)
    letter = record.letter(record.text("answer"), len(options))
    choices = name_images(options, question.count(IMAGE_TAG))
    groups = {"task": record.text("task"), "relation": record.text("image_relation")}
    return Example(str(record.get("idx", str, int)), (Round(content, (letter,), choices),), groups=groups)


MUIRBENCH = Suite(
    name="muirbench",
    description=(
        "2,600 questions of 12 tasks, half of them without an answer among the options, with the published prompt. "
        "License: CC BY 4.0 (not verified)."
    ),
    reference="Wang et al., MuirBench, arXiv 2406.09411",
    load=suite_loader("muirbench", ["test-*.parquet"], _convert, partial(read_records, columns=COLUMNS)),
    metrics=("choice",),
    source="MUIRBENCH/MUIRBENCH",
    max_new_tokens=16,
)
