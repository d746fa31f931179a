"""
NLVR2: whether a sentence is true of a left and a right image, as the authors publish it or as a table of the Hub.

    {"identifier": "test1-0-1-0", "sentence": "…", "label": "True", …}     images in test1-0-1-img0.png and -img1.png
    question_id  question  answer ("True")  left_image  right_image
"""

import re
from functools import partial
from pathlib import Path

from ...data.images import ImageReference
from ..records import Example, Round, Suite
from .source import WITH_LETTER, RawRecord, read_records, suite_loader


COLUMNS = ("identifier", "question_id", "question", "sentence", "answer", "label", "left_image", "right_image")
CHOICES = ("True", "False")


def _convert(record: RawRecord, root: Path) -> Example:
    is_table = "left_image" in record.fields
    sentence_key, label_key = ("question", "answer") if is_table else ("sentence", "label")
    sentence, label = record.text(sentence_key).strip(), record.text(label_key).strip().capitalize()
    if label not in CHOICES:
        raise record.fault(f"has the {label_key} {label!r:.60}", "True or False")
    if is_table:
        key = str(record.get("identifier" if record.fields.get("identifier") else "question_id", str, int))
        images = [record.image(record.fields.get(f"{side}_image"), record.file.parent) for side in ("left", "right")]
    else:
        key = record.text("identifier")
        images = _find_pair(record, key)
    text = (
        f"The first image is the left one, the second the right one. Is this statement about them true?\n{sentence}\n"
        f"(A) True\n(B) False\n{WITH_LETTER}"
    )
    content = (*(image.block() for image in images), {"type": "text", "text": text})
    letter = "AB"[CHOICES.index(label)]
    return Example(key, (Round(content, (letter,), CHOICES),), groups={"label": label})


def _find_pair(record: RawRecord, identifier: str) -> list[ImageReference]:
    """The images in a folder `test1`, `images` or `images/test1`, beside the file or above it."""
    match = re.fullmatch(r"((\w+)-\d+-\d+)-\d+", identifier)
    if match is None:
        raise record.fault(f"has the identifier {identifier!r}", "split-set-pair-sentence")
    names = [f"{match[1]}-img{side}.png" for side in (0, 1)]
    beside = (record.file.parent, record.file.parent.parent)
    folders = [base / name for base in beside for name in (match[2], "images", f"images/{match[2]}", "")]
    folder = next((folder for folder in folders if (folder / names[0]).is_file()), folders[0])
    return [record.image(name, folder) for name in names]


NLVR2 = Suite(
    name="nlvr2",
    description=(
        "6,967 sentences of the public test set (test1). No prompt is published: ours asks for the letter of True or "
        "False. Sentences: CC BY 4.0; images are those of their owners, for research. Column names of the table are "
        "those that others read."
    ),
    reference="Suhr et al., A corpus for reasoning about natural language grounded in photographs, arXiv 1811.00491",
    load=suite_loader(
        "nlvr2", ["test1.json", "unbalanced_test_public-*.parquet"], _convert, partial(read_records, columns=COLUMNS)
    ),
    metrics=("choice",),
    source="lmms-lab/NLVR2",
    max_new_tokens=16,
)
