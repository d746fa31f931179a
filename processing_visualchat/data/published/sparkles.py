"""
SparklesDialogue: dialogues that introduce images by id. `IMAGE#14` becomes `image 1`, its number in the conversation.

    {"dialogue": [{"role": "user", "content": "Describe IMAGE#14<Img><ImageHere></Img>.",
                   "images": [{"image_id": "14", …}]}, {"role": "assistant", "content": "IMAGE#14 is dark."}, …]}
"""

import re
from collections.abc import Iterator
from typing import Any

from ..conversation import Conversation, Dropped, Round
from ..images import ImageReference
from ..ingestion import IngestedRecord
from .source import Check, PublishedSource, get_field, get_image_id, list_reader, remove_tag


# The whole id: `IMAGE#14` is not the beginning of `IMAGE#1417`.
IMAGE_MENTION = r"IMAGE#(\w+)(?:\s*<Img>\s*<ImageHere>\s*</Img>)?"
NOT_IN_TURN = Dropped("user and assistant do not take turns")


def convert_sparkles(record: Any, folder: str) -> Conversation | Dropped:
    dialogue = get_field(record, "dialogue", list)
    if not dialogue:
        return Dropped("no dialogue")
    numbers: dict[str, int] = {}
    rounds: list[Round] = []
    question: tuple[list[ImageReference], str] | None = None
    for turn in dialogue:
        role, text = get_field(turn, "role", str), get_field(turn, "content", str)
        if role != ("user" if question is None else "assistant") or text is None or not text.strip():
            return NOT_IN_TURN
        new = []
        for image in get_field(turn, "images", list) or ():
            image_id = get_image_id(image)
            if image_id is None:
                return Dropped("an image without an id")
            if image_id not in numbers:
                numbers[image_id] = len(numbers) + 1
                new.append(ImageReference("file", f"{folder}/{image_id}.jpg"))
        if role == "assistant" and new:
            return Dropped("the assistant shows an image")
        text = remove_tag(text)
        if any(image_id not in numbers for image_id in re.findall(IMAGE_MENTION, text)):
            return Dropped("an image is named that is not shown")
        text = _number_images(text, numbers)
        if not text:
            return NOT_IN_TURN
        if question is None:
            question = (new, text)
        else:
            rounds.append(Round(*question, text))
            question = None
    return Conversation.from_rounds(rounds, [] if question is None else ["a question without an answer left out"])


def _number_images(text: str, numbers: dict[str, int]) -> str:
    def number(match: re.Match) -> str:
        starts_sentence = re.search(r"(^|[.!?]\s+)$", text[: match.start()]) is not None
        gap = " " if re.match(r"\w", text[match.end() :]) else ""
        return f"{'Image' if starts_sentence else 'image'} {numbers[match[1]]}{gap}"

    return re.sub(IMAGE_MENTION, number, text).strip()


def _read(files: dict[str, Any], images: str, check: Check) -> Iterator[IngestedRecord]:
    for file, contents in files.items():
        yield from list_reader(convert_sparkles)({file: contents}, f"{file.partition('/')[0]}/images", check)


SPARKLES = PublishedSource(
    name="sparkles_dialogue",
    annotations=tuple(f"SparklesDialogue{part}/annotations/SparklesDialogue{part}.json" for part in ("CC", "VG")),
    images="SparklesDialogueCC/images",
    read=_read,
    homepage="https://github.com/HYPJUDY/Sparkles",
    attribution="Huang et al., Sparkles: Unlocking Chats Across Multiple Images, arXiv 2308.16463",
    license="terms of OpenAI; images: Conceptual Captions, and Visual Genome (CC BY 4.0)",
)
