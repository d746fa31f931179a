"""
SparklesEval: dialogues of two rounds that introduce images by id within the text, with reference answers.

    [{"evaluation_id": 1, "dialogue": [{"role": "user", "content": "Compare IMAGE#1<Img><ImageHere></Img> and …",
        "images": [{"image_id": "1", "caption": "…"}, …]}, {"role": "assistant", "content": "IMAGE#1 is …"}, …]}, …]

`IMAGE#1` becomes an image where it is introduced, and `Image 2`, its number in the conversation, anywhere else.
"""

import re
from pathlib import Path

from ...data.published.source import get_image_id
from ...data.published.sparkles import IMAGE_MENTION
from ..records import Example, Round, Suite
from .source import IMAGE_TAG, RawRecord, interleave, read_records, suite_loader, to_record


FILE = "sparkles_evaluation_sparkleseval_annotations.json"


def _convert(record: RawRecord, root: Path) -> Example:
    turns = [to_record(record.where, turn, record.file) for turn in record.get("dialogue", list)]
    speakers = [turn.fields.get("role") for turn in turns]
    if speakers != ["user", "assistant"] * (len(turns) // 2):
        raise record.fault(f"has turns of {speakers!r:.80}", "user and assistant in turn")
    folder = record.file.parent.parent / "images"
    numbers: dict[str, int] = {}
    rounds = []
    for question, answer in zip(turns[::2], turns[1::2]):
        beside = question.fields.get("images")
        ids = [get_image_id(image) for image in beside] if isinstance(beside, list) else [None]
        if None in ids:
            raise record.fault(f"has images {beside!r:.60}", "a list with the image_id of each")
        new = dict.fromkeys(image_id for image_id in ids if image_id and image_id not in numbers)
        shown: list[str] = []

        def place(match: re.Match, new=new, shown=shown) -> str:
            if match[0].endswith(">"):
                shown.append(match[1])
                numbers[match[1]] = len(numbers) + 1
                return IMAGE_TAG
            if match[1] not in numbers:
                raise record.fault(f"names IMAGE#{match[1]}", "an image that was introduced")
            return f"Image {numbers[match[1]]}"

        text = re.sub(IMAGE_MENTION, place, question.text("content"))
        if sorted(shown) != sorted(new):
            raise record.fault(f"introduces the images {shown} in the text and {list(new)} beside it", "the same")
        images = [record.image(f"{image_id}.jpg", folder) for image_id in shown]
        reference = re.sub(IMAGE_MENTION, place, answer.text("content"))
        rounds.append(Round(interleave(record, text, images), (reference,)))
    return Example(str(record.get("evaluation_id", str, int)), tuple(rounds))


SPARKLES_EVAL = Suite(
    name="sparkles_eval",
    description=(
        f"150 dialogues of two rounds; evaluation/SparklesEval with annotations/{FILE} and images. License: terms of "
        "OpenAI; images of Visual Genome (CC BY 4.0). The published judge also reads captions of the images."
    ),
    reference="Huang et al., Sparkles, arXiv 2308.16463",
    load=suite_loader("sparkles_eval", [FILE], _convert, read_records),
    metrics=("judge",),
    max_new_tokens=1000,
)
