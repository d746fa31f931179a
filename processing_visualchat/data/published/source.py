"""What the files of all published datasets share: the record of a dataset, its readers, and the parsing of fields."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..conversation import OUTSIDE, Conversation, Dropped, Round
from ..images import MISSING_IMAGE, ImageReference
from ..ingestion import IngestedRecord


COCO = "coco/train2017"
COCO_IMAGES = "images (COCO): Flickr terms of use"
IMAGE_TAG = "<image>"
LEFT_OUT = "a round without question or answer left out"

# The record itself, or why it is dropped: invalid, or without its images.
Check = Callable[[IngestedRecord], IngestedRecord]
Reader = Callable[[dict[str, Any], str, Check], Iterator[IngestedRecord]]


@dataclass(frozen=True)
class PublishedSource:
    """A published dataset."""

    name: str  # in mixtures
    annotations: tuple[str, ...]  # files of records under the data root
    images: str  # folder, or archive, under the data root
    read: Reader  # from the parsed files by name, `images` and a check of each record to the outcomes
    homepage: str
    attribution: str  # what to cite
    license: str  # of records and images, as their authors state it; no legal advice


def list_reader(
    convert: Callable[[Any, str], Conversation | Dropped],
    key: str | None = None,
    list_forms: Callable[[Any], list] = lambda record: [record],
) -> Reader:
    """The reader of lists of records, at the top or under a key; of several forms, the first with an image counts."""

    def read(files: dict[str, Any], images: str, check: Check) -> Iterator[IngestedRecord]:
        for file, contents in files.items():
            for index, record in enumerate(expect(contents, list, file, key)):
                where = f"{file}, record {index}"
                missing: list[ImageReference] = []
                for form in list_forms(record):
                    checked = check(IngestedRecord(where, 1, convert(form, images)))
                    if not (isinstance(checked.outcome, Dropped) and checked.outcome.reason == MISSING_IMAGE):
                        yield checked
                        break
                    missing += checked.outcome.images
                else:
                    yield IngestedRecord(where, 1, Dropped(MISSING_IMAGE, images=tuple(missing)))

    return read


def expect(contents: Any, expected: type, file: str, key: str | None = None) -> Any:
    """The records of a file, of the right type."""
    if key is not None:
        contents = contents.get(key) if isinstance(contents, dict) else None
    if not isinstance(contents, expected):
        where = f"under {key!r}" if key else "at its top"
        raise ValueError(f"{file} has another schema: {where} it should have a {expected.__name__}.")
    return contents


def get_field(record: Any, key: str, expected: type) -> Any:
    """A field of the right type, or `None`."""
    value = record.get(key) if isinstance(record, dict) else None
    return value if isinstance(value, expected) and not isinstance(value, bool) else None


def get_image_id(record: Any) -> str | None:
    """The id of an image, which some copies give as a number."""
    image_id = record.get("image_id") if isinstance(record, dict) else None
    is_id = isinstance(image_id, (str, int)) and not isinstance(image_id, bool)
    return str(image_id) if is_id and re.fullmatch(r"\w+", str(image_id)) else None


def remove_tag(text: Any) -> str:
    """Text without `<image>` tags; empty for what is not text."""
    return re.sub(rf"\s*{IMAGE_TAG}\s*", "\n", text).strip() if isinstance(text, str) else ""


def locate_image(folder: str, name: str) -> ImageReference | Dropped:
    """A file below the folder; any other path is a reason to drop its record."""
    image = ImageReference.parse(name)
    located = image.resolve(folder) if image.kind == "file" else None
    return located or replace(OUTSIDE, images=(image,))


def filter_rounds(pairs: Any, image: list[ImageReference], repairs: list[str]) -> Conversation | Dropped:
    """Rounds of questions and answers, incomplete ones left out; the images come first."""
    rounds: list[Round] = []
    for question, answer in pairs:
        question, answer = remove_tag(question), remove_tag(answer)
        if question and answer:
            rounds.append(Round([] if rounds else image, question, answer))
        else:
            repairs.append(LEFT_OUT)
    return Conversation.from_rounds(rounds, repairs)


def capitalize(text: str) -> str:
    text = text.strip()
    return text[:1].upper() + text[1:]


def to_sentence(text: str) -> str:
    text = capitalize(text)
    return text if text.endswith((".", "!", "?")) else f"{text}."
