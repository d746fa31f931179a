"""
A-OKVQA: multiple choice with rationales. The question asks for the choice and the reason; the answer gives both.

    {"split": "train", "image_id": 7, "question": "What is he awaiting?", "choices": ["bus", "cab", …],
     "correct_choice_idx": 1, "rationales": ["He stands at a curb with luggage.", …]}
"""

from typing import Any

from ..conversation import Conversation, Dropped, Round
from ..images import ImageReference
from .source import COCO, COCO_IMAGES, PublishedSource, capitalize, get_field, list_reader, remove_tag, to_sentence


def convert_aokvqa(record: Any, folder: str) -> Conversation | Dropped:
    split = get_field(record, "split", str)
    if split != "train":
        return Dropped(f"split {split}")
    image_id, question = get_field(record, "image_id", int), get_field(record, "question", str)
    choices, correct = get_field(record, "choices", list), get_field(record, "correct_choice_idx", int)
    if image_id is None or not question or not choices or correct is None or not 0 <= correct < len(choices):
        return Dropped("no image, question or correct choice")
    rationales = [text for text in map(remove_tag, get_field(record, "rationales", list) or []) if text]
    if not rationales:
        return Dropped("no rationale")
    choices = [remove_tag(str(choice)) for choice in choices]
    question = f"{remove_tag(question)} Choose from {', '.join(choices)}, and give the reason."
    answer = " ".join([f"{capitalize(choices[correct])}.", *map(to_sentence, rationales)])
    image = ImageReference("file", f"{folder}/{image_id:012d}.jpg")
    return Conversation.from_rounds([Round([image], question, answer)])


AOKVQA = PublishedSource(
    name="aokvqa",
    annotations=("aokvqa/annotations/aokvqa_v1p0_train.json",),
    images=COCO,
    read=list_reader(convert_aokvqa),
    homepage="https://allenai.org/project/a-okvqa",
    attribution="Schwenk et al., A-OKVQA, arXiv 2206.01718",
    license=f"CC BY 4.0; {COCO_IMAGES}",
)
