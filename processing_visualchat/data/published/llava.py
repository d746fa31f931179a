"""
LLaVA-Instruct: conversations about one COCO image.

    {"id": "000000000001", "image": "000000000001.jpg",
     "conversations": [{"from": "human", "value": "What is shown?\n<image>"}, {"from": "gpt", "value": "A bus."}, …]}
"""

from typing import Any

from ..conversation import Conversation, Dropped, Turn, pair_turns
from .source import COCO, COCO_IMAGES, IMAGE_TAG, PublishedSource, get_field, list_reader, locate_image, remove_tag


ROLES = {"human": "user", "gpt": "assistant"}


def convert_llava(record: Any, folder: str) -> Conversation | Dropped:
    image, turns = get_field(record, "image", str), get_field(record, "conversations", list)
    if image is None or turns is None:
        return Dropped("no image or no conversations")
    spoken = [(get_field(turn, "from", str), get_field(turn, "value", str)) for turn in turns]
    if any(speaker not in ROLES or text is None for speaker, text in spoken):
        return Dropped("a turn without a known speaker or without text")
    reference = locate_image(folder, image)
    if isinstance(reference, Dropped):
        return reference
    is_odd = sum(text.count(IMAGE_TAG) for _, text in spoken) != 1
    paired = [Turn(ROLES[speaker], [text] if (text := remove_tag(value)) else []) for speaker, value in spoken]
    if (first := next((turn for turn in paired if turn.role == "user"), None)) is not None:
        first.content.insert(0, reference)
    return pair_turns(paired, ["image tag repeated or missing"] if is_odd else [])


LLAVA, LLAVA_DIAL = (
    PublishedSource(
        name=name,
        annotations=tuple(f"llava/{file}.json" for file in files),
        images=COCO,
        read=list_reader(convert_llava),
        homepage="https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K",
        attribution="Liu et al., Visual Instruction Tuning, arXiv 2304.08485",
        license=f"CC BY 4.0 (earlier copies: CC BY-NC 4.0) and the terms of OpenAI; {COCO_IMAGES}",
    )
    for name, files in (("llava", ("detail_23k", "complex_reasoning_77k")), ("llava_dial", ("conversation_58k",)))
)
