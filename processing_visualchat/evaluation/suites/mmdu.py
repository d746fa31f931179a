"""
MMDU: long dialogues about 2 to 20 images, with reference answers.

    {"0": {"id": …, "image": ["mmdu_pics/a.jpg", …], "conversations": [
        {"from": "user", "value": "<ImageHere><ImageHere> Compare them."}, {"from": "assistant", "value": "…"}, …]}, …}
"""

import re
from collections.abc import Iterator
from pathlib import Path

from ..records import Example, Round, Suite
from .source import RawRecord, interleave, read_object, read_records, suite_loader, to_record


TAG = "<ImageHere>"


def _read(file: Path) -> Iterator[RawRecord]:
    """The records of an object by id, as published, or of a list."""
    if file.read_bytes()[:64].lstrip().startswith(b"{") and file.suffix == ".json":
        for key, record in read_object(file).items():
            yield to_record(f"{file}, {key!r}", record, file)
    else:
        yield from read_records(file)


def _convert(record: RawRecord, root: Path) -> Example:
    paths = [re.sub(r"^.*(?=mmdu_pics/)|^/", "", path) for path in record.texts("image")]
    images = [record.image(path, record.file.parent) for path in paths]
    turns = record.get("conversations", list)
    speakers = [turn.get("from") if isinstance(turn, dict) else None for turn in turns]
    if speakers != ["user", "assistant"] * (len(turns) // 2):
        raise record.fault(f"has turns of {speakers!r:.80}", "user and assistant in turn")
    values = [to_record(record.where, turn, record.file).text("value") for turn in turns]
    num_tags = sum(question.count(TAG) for question in values[::2])
    if num_tags != len(images):
        raise record.fault(f"has {num_tags} placeholders {TAG} and {len(images)} images", "as many")
    rounds, start = [], 0
    for question, answer in zip(values[::2], values[1::2]):
        end = start + question.count(TAG)
        rounds.append(Round(interleave(record, question, images[start:end], TAG), (answer,)))
        start = end
    return Example(str(record.get("id", str, int)), tuple(rounds))


MMDU = Suite(
    name="mmdu",
    description=(
        "110 dialogues of up to 17 rounds about 2 to 20 images, in benchmark.json, images in mmdu_pics beside it. "
        "License: CC BY-NC 4.0 and the terms of OpenAI. That image paths begin with mmdu_pics/ is not verified."
    ),
    reference="Liu et al., MMDU, arXiv 2406.11833",
    load=suite_loader("mmdu", ["benchmark.json"], _convert, _read),
    metrics=("judge",),
    source="laolao77/MMDU",
    max_new_tokens=1024,
)
