"""
OCR-VQA: questions about book covers; split 1 is train.

    {"0001": {"questions": ["Who wrote this?", …], "answers": ["A. Author", …], "split": 1, …}, …}
"""

from collections.abc import Iterator
from typing import Any

from ..conversation import Conversation, Dropped
from ..ingestion import IngestedRecord
from .source import Check, PublishedSource, expect, filter_rounds, get_field, locate_image


def convert_ocr_vqa(image_id: str, record: Any, folder: str) -> Conversation | Dropped:
    split = record.get("split") if isinstance(record, dict) else None
    if str(split) != "1":  # some copies give it as text
        return Dropped(f"split {split!s:.20}")
    questions, answers = (get_field(record, key, list) or [] for key in ("questions", "answers"))
    image = locate_image(folder, f"{image_id}.jpg")
    if isinstance(image, Dropped):
        return image
    repairs = ["questions and answers of different number"] if len(questions) != len(answers) else []
    answers = [str(answer) if isinstance(answer, (str, int, float)) else "" for answer in answers]
    return filter_rounds(zip(questions, answers), [image], repairs)


def _read(files: dict[str, Any], images: str, check: Check) -> Iterator[IngestedRecord]:
    for file, contents in files.items():
        for image_id, record in expect(contents, dict, file).items():
            yield check(IngestedRecord(f"{file}, {image_id}", 1, convert_ocr_vqa(image_id, record, images)))


OCR_VQA = PublishedSource(
    name="ocr_vqa",
    annotations=("OCR_VQA/dataset.json",),
    images="OCR_VQA/images",
    read=_read,
    homepage="https://ocr-vqa.github.io",
    attribution="Mishra et al., OCR-VQA: Visual Question Answering by Reading Text in Images, ICDAR 2019",
    license="not stated; images: book covers",
)
