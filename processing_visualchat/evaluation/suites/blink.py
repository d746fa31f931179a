"""
BLINK: visual perception as multiple choice, a table for each task.

    idx  sub_task  prompt (the question with its options)  choices  answer ("(A)")  image_1 … image_4
"""

from functools import partial
from pathlib import Path

from ..records import Example, Round, Suite
from .source import RawRecord, read_records, suite_loader


IMAGES = [f"image_{number}" for number in range(1, 5)]
COLUMNS = ("idx", "sub_task", "prompt", "choices", "answer", *IMAGES)


def _convert(record: RawRecord, root: Path) -> Example:
    sources = [record.fields[key] for key in IMAGES if record.fields.get(key)]
    if not sources:
        raise record.fault("has no image", "one in image_1")
    images = [record.image(source, record.file.parent) for source in sources]
    prompt, choices = record.text("prompt").strip(), tuple(record.options("choices"))
    content = (*(image.block() for image in images), {"type": "text", "text": prompt})
    letter = record.letter(record.text("answer"), len(choices))
    return Example(record.text("idx"), (Round(content, (letter,), choices),), groups={"task": record.text("sub_task")})


BLINK = Suite(
    name="blink",
    description=(
        "1,901 questions of 14 tasks, split val (the answers of test are withheld), images before the prompt that is "
        "published; the score is the mean over tasks. License: Apache-2.0."
    ),
    reference="Fu et al., BLINK, arXiv 2404.12390",
    load=suite_loader("blink", ["val-*.parquet"], _convert, partial(read_records, columns=COLUMNS)),
    metrics=("choice",),
    mean_over="task",
    source="BLINK-Benchmark/BLINK",
    max_new_tokens=64,
)
