"""
The three sets of the original DeepSpeed-VisualChat: rounds with the paths of their images, and no reference answers.

    {"cats1": [["Describe the image.", "./eval/eval_data/images/a.jpg ./eval/eval_data/images/b.jpg"], ["Why?"]], …}
"""

import re
from collections.abc import Iterator
from pathlib import Path

from ..records import Example, Round, Suite
from .source import RawRecord, read_object, suite_loader


PREFIX = re.compile(r"(\./)?eval/eval_data/")  # of image paths, which are relative to the folder above


def _read(file: Path) -> Iterator[RawRecord]:
    for key, rounds in read_object(file).items():
        yield RawRecord(f"{file}, {key!r}", {"name": key, "rounds": rounds}, file)


def _convert(record: RawRecord, root: Path) -> Example:
    rounds = []
    for item in record.get("rounds", list):
        if not (isinstance(item, list) and len(item) in (1, 2) and all(isinstance(text, str) for text in item)):
            raise record.fault(f"has the round {item!r:.60}", "[question] or [question, image paths]")
        if not item[0].strip():
            raise record.fault("has a round without a question", "text")
        paths = item[1].split() if len(item) == 2 else []
        images = [record.image(PREFIX.sub("", path, count=1), record.file.parent) for path in paths]
        rounds.append(Round((*(image.block() for image in images), {"type": "text", "text": item[0].strip()})))
    name = record.fields["name"]
    return Example(name, tuple(rounds), groups={"task": re.sub(r"[\d.]+[a-z]*$", "", name)})


def _suite(name: str, description: str) -> Suite:
    return Suite(
        name=name,
        description=f"{description} Images below the folder of the file; the license of the images is not stated.",
        reference="arXiv 2309.14327; DeepSpeedExamples, applications/DeepSpeed-VisualChat/eval",
        load=suite_loader(name, [f"{name}.json"], _convert, _read),
        metrics=("judge",),
    )


EVAL_SINGLE = _suite("eval_single", "One question about one image, of the original code.")
EVAL_COMPREHENSIVE = _suite("eval_comprehensive", "Conversations of up to 11 rounds about 2 or 3 images.")
EVAL_ROBUSTNESS = _suite("eval_robustness", "One conversation about 3 images, in wordings that differ a little.")
